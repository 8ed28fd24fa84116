"""Figure of an evaluation: average precision per class, with interval and number of positives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from mlssl.drawing.words import plain
from mlssl.evaluation.classes import FEW_POSITIVES, ClassCounts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_NAMED_CLASSES = 100
"""Maximum number of classes with legible names below the bars."""

LAST, OTHERS = "#1f4e79", ("#9db8d2", "#e0a458", "#8fb996", "#b08ea2")
"""The last backbone is the reference: dark; the others are lighter."""


class Bars(NamedTuple):
    """Bars of one backbone."""

    legend: str
    heights: Tensor
    """(L,) in 0–1, NaN for a class that has no average precision."""
    ends: Tensor
    """(L, 2), the interval of each."""


def draw_average_precision(path: Path, bars: Sequence[Bars], counts: ClassCounts) -> Figure:
    """Draw the average precision per class with 95 % intervals, backbones side by side, sorted by the last one.

    Args:
        path: PNG to write.
        bars: Bars of at least one backbone; classes without average precision for the last one are left out.
        counts: Positives, shown after the name of a class; a star marks a rare class.

    Returns:
        The figure, which a notebook shows.
    """
    from matplotlib.figure import Figure  # takes a second, which other commands should not pay

    last = bars[-1].heights
    there = [index for index in last.argsort(descending=True).tolist() if last[index].isfinite()]
    inches = min(max(8.0, 0.13 * len(there) * max(2, len(bars))), 40.0)
    figure = Figure(figsize=(inches, 5.2 + 0.22 * len(bars)), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(bars)
    for number, one in enumerate(bars):
        positions = [position + (number - (len(bars) - 1) / 2) * width for position in range(len(there))]
        color = LAST if number == len(bars) - 1 else OTHERS[number % len(OTHERS)]
        axes.bar(positions, one.heights[there].tolist(), width, color=color, label=plain(one.legend))
        if len(there) <= MAX_NAMED_CLASSES:
            axes.vlines(positions, *one.ends[there].T.tolist(), color="#808080", linewidth=0.8)
    axes.set_xlim(-0.8, len(there) - 0.2)
    axes.set_ylim(0, 1)
    axes.set_ylabel("average precision")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    lines = "; lines: 95 % intervals" if len(there) <= MAX_NAMED_CLASSES else ""
    about = f"after each class: positives among the test images, * fewer than {FEW_POSITIVES}{lines}"
    if len(there) <= MAX_NAMED_CLASSES:
        axes.set_xticks(range(len(there)), [plain(counts.label(index)) for index in there], rotation=90, fontsize=8)
    else:
        rare = sum(counts.test[index] < FEW_POSITIVES for index in there)
        about = f"{len(there)} classes, {rare} of them with fewer than {FEW_POSITIVES} positives among the test images"
    axes.set_xlabel(about, fontsize=9)
    figure.legend(loc="outside upper left", frameon=False, ncols=1)
    figure.savefig(path, dpi=120, format="png")
    return figure
