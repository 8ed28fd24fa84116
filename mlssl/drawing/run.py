"""Matplotlib figures of a run: images for a logger, or SVG that takes its colours from the surrounding page."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mlssl.drawing.words import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[Sequence[float], Sequence[float]]
"""x and y of the same length."""

SIZE = (4.4, 2.7)  # inches; at 400 pixels wide, 9-point text is 9 pixels
INK, RULE, MUTED = "#1c1d21", "#d3d5da", "#9a9ca5"
SERIES = ("#1f6feb", "#d9480f", "#2b8a3e", "#9c36b5", "#0b7285", "#e67700", "#c2255c", "#5c5f66")
"""Colour-blind-safe colours, dark enough for a white page; a dark page has its own."""

MAX_BARS = 60
"""Maximum number of classes drawn."""

MAX_HOVERED = 400
"""Points of a curve that react to the pointer."""

KINDS = {"same_block": "same block", "same_image": "same image, other block", "other_image": "other image"}


def figure_of_curves(
    curves: Mapping[str, Curve],
    ylabel: str,
    xlabel: str = "step",
    levels: Mapping[str, float] | None = None,
    *,
    from_zero: bool = False,
) -> Figure:
    """Plot curves over the steps or epochs of a run in one panel.

    Args:
        curves: Name → x and y.
        ylabel: Label with unit.
        xlabel: Label with unit.
        levels: Name → reference value, drawn dashed.
        from_zero: Whether the y axis starts at 0, for quantities whose ratios matter.
    """
    figure, axes = _figure()
    for number, (name, curve) in enumerate(curves.items()):
        _draw_curve(axes, curve, SERIES[number % len(SERIES)], name)
    for number, (name, value) in enumerate((levels or {}).items()):
        axes.axhline(
            value, color=SERIES[(len(curves) + number) % len(SERIES)], label=name, linestyle="--", linewidth=1.2
        )
    _whole_numbers(axes, [position for x, _ in curves.values() for position in x])
    if from_zero:
        axes.set_ylim(0, 1.05 * axes.dataLim.y1 or 1)
    axes.set_xlabel(plain(xlabel))
    axes.set_ylabel(plain(ylabel))
    _legend(axes)
    return figure


def figure_of_panels(panels: Mapping[str, Mapping[str, Curve]], xlabel: str = "step") -> Figure:
    """Plot curves over the steps of a run, one panel with its own scale per quantity.

    Args:
        panels: Quantity → name → x and y. All panels have the names of the first.
        xlabel: Label with unit.
    """
    height = 0.6 + 1.25 * len(panels)
    figure, first = _figure(len(panels), (SIZE[0], max(SIZE[1], height)))
    for axes, (quantity, curves) in zip(figure.axes, panels.items(), strict=True):
        for number, (name, curve) in enumerate(curves.items()):
            _draw_curve(axes, curve, SERIES[number % len(SERIES)], name)
        axes.set_ylabel(plain(quantity))
    _whole_numbers(first, [position for curves in panels.values() for x, _ in curves.values() for position in x])
    figure.axes[-1].set_xlabel(plain(xlabel))
    if len(next(iter(panels.values()))) > 1:
        _legend(first)
    return figure


def figure_of_cosines(moments: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Plot histograms of the cosines of pairs of views, one row per moment, one colour per kind of pair.

    Args:
        moments: Name of the moment → `mlssl.evaluation.geometry.pair_cosines`.
    """
    figure, first = _figure(len(moments))
    for axes, (moment, kinds) in zip(figure.axes, moments.items(), strict=True):
        for number, (kind, cosines) in enumerate(kinds.items()):
            shares = torch.histc(cosines, 50, -1, 1) / len(cosines)
            edges = torch.linspace(-1, 1, 51).tolist()
            axes.stairs(shares.tolist(), edges, color=SERIES[number], label=KINDS[kind], linewidth=1.4)
            axes.stairs(shares.tolist(), edges, color=SERIES[number], alpha=0.16, fill=True)
        axes.set_ylabel(plain(f"share, {moment}"))
        axes.set_xlim(-1, 1)
    figure.axes[-1].set_xlabel("cosine")
    _legend(first)
    return figure


def figure_of_spectra(moments: Mapping[str, Tensor]) -> Figure:
    """Plot the singular values of the features, largest first.

    Args:
        moments: Name of the moment → singular values, largest first.
    """
    figure, axes = _figure()
    for number, (moment, values) in enumerate(moments.items()):
        strongest = values[0].clamp(min=torch.finfo(values.dtype).tiny)
        relative = (values / strongest).clamp(min=1e-6)
        axes.plot(
            range(1, len(values) + 1), relative.tolist(), color=SERIES[1 - number % 2], label=moment, linewidth=1.6
        )
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-6)
    axes.set_xlabel("direction, strongest first")
    axes.set_ylabel("singular value ÷ largest")
    _legend(axes)
    return figure


def figure_of_classes(precisions: Mapping[str, Tensor], names: Sequence[str] | None = None) -> Figure:
    """Plot average precision per class, sorted by the last backbone; classes without positives are left out.

    Args:
        precisions: Name of a backbone → (L,) in 0–1, NaN for a class that is not shown.
        names: L labels of the bars; beyond `MAX_BARS` classes those in the middle are left out. None draws all,
            without names.
    """
    last = list(precisions.values())[-1]
    order = last.nan_to_num(-1).argsort(descending=True)
    order = order[last[order].isfinite()]
    if names is not None and len(order) > MAX_BARS:
        order = torch.cat([order[: MAX_BARS // 2], order[-(MAX_BARS // 2) :]])
    size = SIZE if names is None else (SIZE[0], 1.0 + 0.17 * len(order))
    figure, axes = _figure(size=size)
    at = range(len(order))
    for number, (name, values) in enumerate(precisions.items()):
        colour, ends = (
            SERIES[1 - number % 2],
            ([position - 0.4 for position in at], [position + 0.4 for position in at]),
        )
        lengths = values[order].tolist()
        if number == len(precisions) - 1:
            bars = axes.bar if names is None else axes.barh
            bars(at, lengths, 0.8, color=colour, alpha=0.6, label=name)
        else:
            strokes = axes.hlines if names is None else axes.vlines
            strokes(lengths, *ends, colors=colour, label=name, linewidth=2, zorder=3)
    if names is None:
        axes.set_ylim(0, 1)
        axes.set_xticks([])
        axes.set_xlabel(f"{len(order)} classes, sorted")
        axes.set_ylabel("average precision")
    else:
        words = [names[index] for index in order.tolist()]
        axes.set_xlim(0, 1)
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.set_yticks(at, [plain(word) for word in words])
        axes.fmt_ydata = lambda position: words[round(position)]
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("average precision")
    _legend(axes)
    return figure


def figure_of_map(
    positions: Tensor, shares: tuple[float, float] | None, groups: Sequence[int], names: Sequence[str]
) -> Figure:
    """Plot images as points in two dimensions, coloured by one of their labels.

    Args:
        positions: (n, 2), output of `mlssl.evaluation.geometry.map_2d` or `neighbor_map`.
        shares: Fraction of the variance along each axis, 0–1; None if the axes have no meaning.
        groups: (n,): index in `names`, or −1 for none of them.
        names: At most 8 labels; the first one present gives an image its colour.
    """
    figure, axes = _figure(size=(4.4, 4.2))
    colours = [SERIES[group] if group >= 0 else MUTED for group in groups]
    points = axes.scatter(positions[:, 0].tolist(), positions[:, 1].tolist(), c=colours, s=13, linewidths=0)
    points.set_gid("points")
    for number, name in enumerate(names):
        axes.scatter([], [], color=SERIES[number], s=16, label=name)
    if names and -1 in groups:
        axes.scatter([], [], color=MUTED, s=16, label="others")
    if shares is None:
        axes.tick_params(labelbottom=False, labelleft=False)
    else:
        axes.set_xlabel(f"1st direction ({shares[0]:.0%} of the variance)")
        axes.set_ylabel(f"2nd direction ({shares[1]:.0%})")
    _legend(axes, columns=3)
    return figure


def svg(figure: Figure, name: str) -> str:
    """Convert a figure to an `<svg>` element with the page's style variables as colours.

    Args:
        figure: A figure of this module.
        name: Letters and dashes; prefix of every id, so that ids are unique on a page.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = (
        re.sub(r'\bid="', f'id="{name}-', text).replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    )
    text = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", text)
    text = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", text)
    for colour, variable in _variables().items():
        text = text.replace(colour, f"var({variable})")
    # Text uses the page's font, not the one matplotlib measured.
    return re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)


def hover_points(figure: Figure) -> list[tuple[float, float, str]]:
    """Tooltips of a figure: x and y in the units of its SVG, and text.

    Points are those of lines, bars and steps of histograms that have a name.

    Args:
        figure: Figure already passed to `svg`, which lays it out.
    """
    found: list[tuple[float, float, str]] = []
    scale, height = 72 / figure.dpi, figure.bbox.height
    for axes in figure.axes:
        for name, x, y, across in _named_points(axes):
            every = max(1, len(x) // MAX_HOVERED)
            positions = axes.transData.transform(list(zip(x[::every], y[::every], strict=True)))
            for left, right, (across_page, up) in zip(x[::every], y[::every], positions, strict=True):
                key, value = (axes.format_ydata(right), left) if across else (axes.format_xdata(left), right)
                words = f"{key}: {name} {value:.3g}" if across else f"{_label(axes)}{key}: {name} {value:.4g}"
                found.append((round(across_page * scale, 1), round((height - up) * scale, 1), words))
    return found


def _label(axes: Axes) -> str:
    words = axes.get_xlabel() or axes.figure.axes[-1].get_xlabel()
    return f"{words} " if words else ""


def _named_points(axes: Axes) -> Iterator[tuple[str, list[float], list[float], bool]]:
    """Name, x, y, and whether the value is along x, of each named artist."""
    from matplotlib.patches import StepPatch

    for line in axes.lines:
        x, y = np.asarray(line.get_xydata()).T.tolist()
        if len(x) > 2 or line.get_marker() not in ("", "None"):  # a level has two points, its ends
            yield str(line.get_label()), x, y, False
    for bars in axes.containers:
        horizontal = getattr(bars, "orientation", "vertical") == "horizontal"
        if horizontal:
            values = [float(bar.get_width()) for bar in bars]
            yield str(bars.get_label()), values, [float(bar.get_y() + bar.get_height() / 2) for bar in bars], True
    for patch in axes.patches:
        if isinstance(patch, StepPatch) and not patch.get_fill():
            shares, edges, _ = patch.get_data()
            middles = [(left + right) / 2 for left, right in itertools.pairwise(edges)]
            yield str(patch.get_label()), middles, list(map(float, shares)), False


def _variables() -> dict[str, str]:
    series = {colour: f"--series-{number}" for number, colour in enumerate(SERIES)}
    return {INK: "--ink", RULE: "--rule", MUTED: "--muted", **series}


def _draw_curve(axes: Axes, curve: Curve, colour: str, name: str) -> None:
    marker = "o" if len(curve[0]) <= 30 else ""
    axes.plot(*curve, color=colour, label=name, linewidth=1.6, marker=marker, markersize=3.5)


def _whole_numbers(axes: Axes, at: Sequence[float]) -> None:
    """Put ticks at whole numbers on the x axis, even for a single one."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if at and min(at) == max(at):
        axes.set_xlim(at[0] - 1, at[0] + 1)


def _figure(rows: int = 1, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    for axes in figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]:
        axes.grid(color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, labelsize=8.5, length=0)
        axes.fmt_xdata = axes.fmt_ydata = lambda value: f"{value:.4g}"
        axes.xaxis.label.set(color=INK, size=9)
        axes.yaxis.label.set(color=INK, size=9)
        for side, line in axes.spines.items():
            line.set_visible(side in ("left", "bottom"))
            line.set_color(RULE)
    return figure, figure.axes[0]


def _legend(axes: Axes, columns: int | None = None) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = columns or (len(labels) if sum(map(len, labels)) < 44 else 2 if max(map(len, labels)) < 26 else 1)
        axes.legend(
            handles,
            [plain(label) for label in labels],
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=columns,
            frameon=False,
            fontsize=8.5,
            labelcolor=INK,
            borderaxespad=0.2,
            handlelength=1.4,
            columnspacing=1.2,
        )
