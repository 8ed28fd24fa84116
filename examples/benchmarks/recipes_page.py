"""The table of docs/which_recipe.md, from the rows of recipes.jsonl."""

from pathlib import Path
from typing import Any

MARKS = "<!-- recipes.jsonl -->", "<!-- end of recipes.jsonl -->"
NOT_YET = "not yet measured"
NAMES = ("mlssl", "soft", "paper")
SETS = {"corel5k": "Corel-5K", "ucmerced": "UC Merced"}
VIEWS = {"corel5k": (20, 40), "ucmerced": (40,)}
"""Views per image at which recipes without a trial have a line, too."""

SCORES = ("average", "average_max", "knn")


def title(row: dict[str, Any]) -> str:
    """Recipe or peer, with what was changed."""
    changed = dict(row["changed"])
    words = changed.pop("change", [])
    words += [f"{name} {value}" for name, value in changed.items()]
    return ", ".join([f"`{row['name']}`", *words])


def cell(rows: list[dict[str, Any]], score: str) -> str:
    """Mean over the seeds, and how many they are."""
    if not rows:
        return NOT_YET
    mean = sum(row[score] for row in rows) / len(rows)
    return f"{mean:.3f} ({len(rows)} seed{'s' if len(rows) > 1 else ''})"


def table(rows: list[dict[str, Any]]) -> str:
    """Cross-validated mAP of each recipe, then of every other trial, the best first."""
    lines = [
        "| set | views per image | recipe | average pooling | (average + maximum) / 2 | kNN |",
        "|---|---|---|---|---|---|",
    ]
    for of, name_of_set in SETS.items():
        for views in sorted({*VIEWS[of], *(row["views"] for row in rows if row["set"] == of)}):
            trials: dict[str, list[dict[str, Any]]] = {f"`{name}`": [] for name in NAMES}
            for row in rows:
                if (row["set"], row["views"]) == (of, views):
                    trials.setdefault(title(row), []).append(row)
            ours, others = list(trials.items())[: len(NAMES)], list(trials.items())[len(NAMES) :]
            for name, found in ours + sorted(others, key=lambda one: -one[1][0]["cv_average"]):
                if found or views in VIEWS[of]:
                    cells = " | ".join(cell(found, f"cv_{score}") for score in SCORES)
                    lines.append(f"| {name_of_set} | {views:g} | {name} | {cells} |")
    return "\n".join(lines)


def renew(page: Path, rows: list[dict[str, Any]]) -> None:
    """Put the table between the marks of a page."""
    before, rest = page.read_text().split(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n{table(rows)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
