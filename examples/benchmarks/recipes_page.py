"""The table of docs/which_recipe.md, from the rows of recipes.jsonl."""

from pathlib import Path
from typing import Any

MARKS = "<!-- recipes.jsonl -->", "<!-- end of recipes.jsonl -->"
NOT_YET = "not yet measured"
NAMES = ("mlssl", "soft", "paper")
SETS = {"corel5k": "Corel-5K", "ucmerced": "UC Merced"}
VIEWS = (20, 40)


def plain(rows: list[dict[str, Any]], name: str, of: str, views: float) -> list[dict[str, Any]]:
    """The trials of a recipe with nothing changed."""
    found = [row for row in rows if (row["name"], row["set"], row["views"]) == (name, of, views)]
    return [row for row in found if not row.get("changed")]


def cell(rows: list[dict[str, Any]], score: str) -> str:
    """Mean over the seeds, and how many they are."""
    if not rows:
        return NOT_YET
    mean = sum(row[score] for row in rows) / len(rows)
    return f"{mean:.3f} ({len(rows)} seed{'s' if len(rows) > 1 else ''})"


def table(rows: list[dict[str, Any]]) -> str:
    """Cross-validated mAP of each recipe."""
    lines = [
        "| set | views per image | recipe | average pooling | (average + maximum) / 2 | kNN |",
        "|---|---|---|---|---|---|",
    ]
    for of, title in SETS.items():
        for views in VIEWS:
            for name in NAMES:
                found = plain(rows, name, of, views)
                scores = " | ".join(cell(found, f"cv_{score}") for score in ("average", "average_max", "knn"))
                lines.append(f"| {title} | {views} | `{name}` | {scores} |")
    return "\n".join(lines)


def renew(page: Path, rows: list[dict[str, Any]]) -> None:
    """Put the table between the marks of a page."""
    before, rest = page.read_text().split(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n{table(rows)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
