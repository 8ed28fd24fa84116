"""Results of an evaluation: a table on the screen, and JSON, CSV and a plot in a new folder."""

from __future__ import annotations

import csv
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlssl.atomic import written_aside
from mlssl.drawing.classes import Bars, draw_average_precision
from mlssl.evaluation.bootstrap import Resampled, interval_of
from mlssl.evaluation.classes import FEW_POSITIVES, ClassCounts, frequent_mean
from mlssl.runs import new_run_folder

FREQUENT = f"mAP (≥{FEW_POSITIVES})"
"""Column of the mean over the classes that are not rare."""

MAX_PRINTED_CLASSES = 100
"""Maximum number of classes whose positives are printed; the files list all."""

WIDTH = 80
"""Terminal width that the list of classes has to fit."""


class BackboneResult(NamedTuple):
    """Results of one backbone: its row of the table, more values for the JSON, and the AP per class."""

    source: str
    """Name of the backbone, marked if its weights are random."""
    columns: dict[str, str]
    numbers: dict[str, Any]
    """Include "mAP"."""
    average_precision: Tensor
    resampled: Resampled
    """Bootstrap of the test images, with the same samples for all backbones."""


class Difference(NamedTuple):
    """Difference in mAP of two backbones on the same test images: a row of the table, and numbers for the JSON."""

    source: str
    columns: dict[str, str]
    numbers: dict[str, Any]


def differences(results: Sequence[BackboneResult]) -> list[Difference]:
    """Every pair of backbones, the later minus the earlier, with the interval of the paired bootstrap."""
    rows = []
    for later, earlier in ((b, a) for number, b in enumerate(results) for a in results[:number]):
        value = later.numbers["mAP"] - earlier.numbers["mAP"]
        low, high = interval_of(later.resampled.means - earlier.resampled.means, value)
        columns = {"mAP": f"{value:+.3f}", "95 % interval, paired": f"{low:+.3f} to {high:+.3f}"}
        if low <= 0 <= high:
            columns["holds 0"] = "yes"
        numbers = {"of": later.source, "minus": earlier.source, "mAP": value, "interval": (low, high)}
        rows.append(Difference(f"{short(later.source)} − {short(earlier.source)}", columns, numbers))
    return rows


def print_table(rows: Sequence[BackboneResult] | Sequence[Difference], first: str = "backbone") -> None:
    """Print one line per row, nothing without rows; missing cells stay empty."""
    if not rows:
        return
    names = list(dict.fromkeys(name for one in rows for name in one.columns))
    table = [[first, *names], *([one.source, *(one.columns.get(name, "") for name in names)] for one in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(names) + 1)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_positives(counts: ClassCounts) -> None:
    """Print the number of positives of each class in the test images, most frequent first."""
    order = sorted(range(len(counts.classes)), key=lambda index: -counts.test[index])
    rare = sum(number < FEW_POSITIVES for number in counts.test)
    words = [counts.label(index) for index in order[:MAX_PRINTED_CLASSES]]
    if len(order) > MAX_PRINTED_CLASSES:
        words.append(f"and {len(order) - MAX_PRINTED_CLASSES} more in classes.csv")
    print(
        f"positives in the test images; {rare} of {len(order)} classes, marked *, have fewer than {FEW_POSITIVES} and "
        f"are left out of {FREQUENT}:"
    )
    kept = ", ".join(
        word.replace(" ", "\N{NO-BREAK SPACE}") for word in words
    )  # keep a class and its number on one line
    lines = textwrap.fill(kept, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    print(lines.replace("\N{NO-BREAK SPACE}", " "))


def write_results(
    runs: str,
    name: str,
    results: Sequence[BackboneResult],
    between: Sequence[Difference],
    counts: ClassCounts,
    settings: Mapping[str, Any],
) -> Path:
    """Write JSON, tables and a plot to ``runs/name-<time>/``.

    ``results.json`` contains everything, ``table.csv`` the printed table, ``differences.csv`` the differences of each
    pair of backbones, ``classes.csv`` positives and average precision per class, ``average_precision.png`` their plot.

    Raises:
        OSError: If they cannot be written.
    """
    folder = new_run_folder(runs, name)
    by_class = [one.average_precision.tolist() for one in results]
    positives = torch.tensor(counts.test)
    entries = [
        {
            "source": one.source,
            **one.numbers,
            "frequent_mAP": frequent_mean(one.average_precision, positives),
            "average_precision": dict(zip(counts.classes, values, strict=True)),
            "average_precision_interval": dict(
                zip(counts.classes, one.resampled.class_intervals.tolist(), strict=True)
            ),
        }
        for one, values in zip(results, by_class, strict=True)
    ]
    content = {
        "settings": dict(settings),
        "results": entries,
        "differences": [one.numbers for one in between],
        "positives": {
            key: {"train": train, "test": test, "rare": test < FEW_POSITIVES}
            for key, train, test in zip(*counts, strict=True)
        },
    }
    with written_aside(folder / "results.json") as aside:
        aside.write_text(json.dumps(_without_nan(content), indent=1))
    _write_table(folder / "table.csv", "backbone", results)
    if between:
        _write_table(folder / "differences.csv", "difference", between)
    _write_csv(
        folder / "classes.csv",
        ["class", "training positives", "test positives", *(one.source for one in results)],
        [list(row) for row in zip(*counts, *by_class, strict=True)],
    )
    with written_aside(folder / "average_precision.png") as aside:
        draw_average_precision(aside, [_bars(one) for one in results], counts)
    return folder


def _bars(one: BackboneResult) -> Bars:
    low, high = one.numbers["interval"]
    legend = f"{short(one.source)}: mAP {one.numbers['mAP']:.3f} ({low:.3f}–{high:.3f})"
    return Bars(legend, one.average_precision, one.resampled.class_intervals)


def _write_table(path: Path, first: str, rows: Sequence[BackboneResult] | Sequence[Difference]) -> None:
    names = list(dict.fromkeys(name for one in rows for name in one.columns))
    _write_csv(path, [first, *names], [[one.source, *map(one.columns.get, names)] for one in rows])


def _write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    with written_aside(path) as aside, aside.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _without_nan(value: Any) -> Any:
    """The value with None for NaN, and text for other values that JSON cannot represent."""
    if isinstance(value, Mapping):
        return {str(key): _without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    if isinstance(value, float):
        return None if math.isnan(value) else value
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def short(source: str, most: int = 60) -> str:
    """The end of a long backbone name, which is the most specific part."""
    return source if len(source) <= most else f"…{source[-most:]}"
