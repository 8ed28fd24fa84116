"""What an evaluation found: a table on the screen, and JSON, CSV and a picture in a folder of its own."""

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

MOST_COUNTED_CLASSES = 200
"""Classes whose positives are printed; the files list all."""

WIDTH = 80
"""Columns of a terminal that a list of classes fits."""


class Found(NamedTuple):
    """Results of one backbone: its row of the table, more values for the JSON, and the AP per class."""

    source: str
    """With a mark where the weights are random."""
    columns: dict[str, str]
    numbers: dict[str, Any]
    """Among them "mAP"."""
    average_precision: Tensor
    resampled: Resampled
    """Of the test images, the same draws for all backbones."""


class Difference(NamedTuple):
    """Of the mAP of two backbones on the same test images, as a row of a table, and numbers for the JSON."""

    source: str
    columns: dict[str, str]
    numbers: dict[str, Any]


def differences(found: Sequence[Found]) -> list[Difference]:
    """Each two backbones, the later minus the earlier, with the interval of the paired bootstrap."""
    rows = []
    for later, earlier in ((b, a) for number, b in enumerate(found) for a in found[:number]):
        value = later.numbers["mAP"] - earlier.numbers["mAP"]
        low, high = interval_of(later.resampled.means - earlier.resampled.means, value)
        columns = {"mAP": f"{value:+.3f}", "95 % interval, paired": f"{low:+.3f} to {high:+.3f}"}
        if low <= 0 <= high:
            columns["holds 0"] = "yes"
        numbers = {"of": later.source, "minus": earlier.source, "mAP": value, "interval": (low, high)}
        rows.append(Difference(f"{short(later.source)} − {short(earlier.source)}", columns, numbers))
    return rows


def print_table(rows: Sequence[Found] | Sequence[Difference], first: str = "backbone") -> None:
    """One line per row, or nothing without rows; what one of them lacks is left open."""
    if not rows:
        return
    names = list(dict.fromkeys(name for one in rows for name in one.columns))
    table = [[first, *names], *([one.source, *(one.columns.get(name, "") for name in names)] for one in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(names) + 1)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_counts(counts: ClassCounts) -> None:
    """Print the positives of each class among the test images, most frequent first."""
    order = sorted(range(len(counts.classes)), key=lambda index: -counts.test[index])
    rare = sum(number < FEW_POSITIVES for number in counts.test)
    words = [counts.label(index) for index in order[:MOST_COUNTED_CLASSES]]
    if len(order) > MOST_COUNTED_CLASSES:
        words.append(f"and {len(order) - MOST_COUNTED_CLASSES} more in classes.csv")
    print(
        f"positives among the test images; {rare} of {len(order)} classes, marked *, have fewer than {FEW_POSITIVES}, "
        f"and {FREQUENT} leaves them out:"
    )
    kept = ", ".join(word.replace(" ", "\N{NO-BREAK SPACE}") for word in words)  # a class and its number in one line
    lines = textwrap.fill(kept, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    print(lines.replace("\N{NO-BREAK SPACE}", " "))


def write_results(
    runs: str,
    name: str,
    found: Sequence[Found],
    between: Sequence[Difference],
    counts: ClassCounts,
    settings: Mapping[str, Any],
) -> Path:
    """Write JSON, tables and a picture to ``runs/name-<time>/``.

    ``results.json`` has everything, ``table.csv`` the printed table, ``differences.csv`` that of each two backbones,
    ``classes.csv`` positives and average precision of each class, and ``average_precision.png`` the same as bars.

    Raises:
        OSError: If they cannot be written.
    """
    folder = new_run_folder(runs, name)
    by_class = [one.average_precision.tolist() for one in found]
    positives = torch.tensor(counts.test)
    results = [
        {
            "source": one.source,
            **one.numbers,
            "frequent_mAP": frequent_mean(one.average_precision, positives),
            "average_precision": dict(zip(counts.classes, values, strict=True)),
            "average_precision_interval": dict(
                zip(counts.classes, one.resampled.class_intervals.tolist(), strict=True)
            ),
        }
        for one, values in zip(found, by_class, strict=True)
    ]
    content = {
        "settings": dict(settings),
        "results": results,
        "differences": [one.numbers for one in between],
        "positives": {
            key: {"train": train, "test": test, "rare": test < FEW_POSITIVES}
            for key, train, test in zip(*counts, strict=True)
        },
    }
    with written_aside(folder / "results.json") as aside:
        aside.write_text(json.dumps(_without_nan(content), indent=1))
    _write_table(folder / "table.csv", "backbone", found)
    if between:
        _write_table(folder / "differences.csv", "difference", between)
    _write_csv(
        folder / "classes.csv",
        ["class", "training positives", "test positives", *(one.source for one in found)],
        [list(row) for row in zip(*counts, *by_class, strict=True)],
    )
    with written_aside(folder / "average_precision.png") as aside:
        draw_average_precision(aside, [_bars(one) for one in found], counts)
    return folder


def _bars(one: Found) -> Bars:
    low, high = one.numbers["interval"]
    legend = f"{short(one.source)}: mAP {one.numbers['mAP']:.3f} ({low:.3f}–{high:.3f})"
    return Bars(legend, one.average_precision, one.resampled.class_intervals)


def _write_table(path: Path, first: str, rows: Sequence[Found] | Sequence[Difference]) -> None:
    names = list(dict.fromkeys(name for one in rows for name in one.columns))
    _write_csv(path, [first, *names], [[one.source, *map(one.columns.get, names)] for one in rows])


def _write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    with written_aside(path) as aside, aside.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _without_nan(value: Any) -> Any:
    """The same value with None for NaN, which JSON lacks, and text for values that JSON cannot represent."""
    if isinstance(value, Mapping):
        return {str(key): _without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    if isinstance(value, float):
        return None if math.isnan(value) else value
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def short(source: str, most: int = 60) -> str:
    """The end of a long name of a backbone, which says most about it."""
    return source if len(source) <= most else f"…{source[-most:]}"
