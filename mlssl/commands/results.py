"""What an evaluation found: a table on the screen, and JSON, CSV and a picture in a folder of its own."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mlssl.atomic import written_aside
from mlssl.drawing.words import plain
from mlssl.runs import new_run_folder

MOST_NAMED_CLASSES = 100
"""Classes whose names are still legible below the bars."""


class Found(NamedTuple):
    """Of one backbone: what stands in its line of the table, more for the JSON, and the AP of each class."""

    source: str
    columns: dict[str, str]
    numbers: dict[str, Any]
    average_precision: Tensor


def print_table(found: Sequence[Found]) -> None:
    """One line a backbone; what one of them lacks is left open."""
    names = list(dict.fromkeys(name for one in found for name in one.columns))
    rows = [["backbone", *names], *([one.source, *(one.columns.get(name, "") for name in names)] for one in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(names) + 1)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def write_results(
    runs: str, name: str, found: Sequence[Found], classes: Sequence[str], settings: Mapping[str, Any]
) -> Path:
    """Write ``results.json``, ``table.csv``, ``classes.csv`` and ``average_precision.png`` to ``runs/name-<time>/``.

    Raises:
        OSError: If they cannot be written.
    """
    folder = new_run_folder(runs, name)
    by_class = [one.average_precision.tolist() for one in found]
    results = [
        {
            "source": one.source,
            **one.numbers,
            "average_precision": dict(zip(classes, values, strict=True)),
        }
        for one, values in zip(found, by_class, strict=True)
    ]
    with written_aside(folder / "results.json") as aside:
        aside.write_text(json.dumps(_without_nan({"settings": dict(settings), "results": results}), indent=1))
    names = list(dict.fromkeys(name for one in found for name in one.columns))
    _write_csv(
        folder / "table.csv", ["backbone", *names], [[one.source, *map(one.columns.get, names)] for one in found]
    )
    _write_csv(
        folder / "classes.csv",
        ["class", *(one.source for one in found)],
        [[key, *values] for key, *values in zip(classes, *by_class, strict=True)],
    )
    with written_aside(folder / "average_precision.png") as aside:
        draw_average_precision(aside, [one.source for one in found], [one.average_precision for one in found], classes)
    return folder


def draw_average_precision(
    path: Path, sources: Sequence[str], by_class: Sequence[Tensor], classes: Sequence[str]
) -> None:
    """Bars of each class's average precision, the backbones side by side, sorted by the last one.

    Args:
        path: PNG to write.
        sources: Names of the backbones.
        by_class: (L,) of each; a class that has no AP is left out.
        classes: L names.
    """
    from matplotlib.figure import Figure  # takes a second, which other commands should not pay

    there = [index for index in range(len(classes)) if not math.isnan(by_class[-1][index])]
    there.sort(key=lambda index: -by_class[-1][index].item())
    inches = min(max(8.0, 0.13 * len(there) * max(2, len(sources))), 40.0)
    figure = Figure(figsize=(inches, 5), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(sources)
    # The last one is what the others are compared with: it is dark, they are lighter.
    shades = ["#9db8d2", "#e0a458", "#8fb996", "#b08ea2"]
    for number, (source, values) in enumerate(zip(sources, by_class, strict=True)):
        places = [place + (number - (len(sources) - 1) / 2) * width for place in range(len(there))]
        last = number == len(sources) - 1
        mean = values[there].nanmean().item()
        color = "#1f4e79" if last else shades[number % len(shades)]
        axes.bar(places, values[there].tolist(), width, color=color, label=plain(f"{_short(source)}  (mAP {mean:.3f})"))
    axes.set_xlim(-0.8, len(there) - 0.2)
    axes.set_ylim(0, 1)
    axes.set_ylabel("average precision")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(there) <= MOST_NAMED_CLASSES:
        axes.set_xticks(range(len(there)), [plain(classes[index]) for index in there], rotation=90, fontsize=8)
    else:
        axes.set_xlabel(f"{len(there)} classes")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, format="png")


def _write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    with written_aside(path) as aside, aside.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _without_nan(value: Any) -> Any:
    """The same with None for NaN, which JSON does not have, and words for what it cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): _without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    if isinstance(value, float):
        return None if math.isnan(value) else value
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def _short(source: str, most: int = 60) -> str:
    return source if len(source) <= most else f"…{source[-most:]}"
