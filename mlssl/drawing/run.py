"""Figures of a run, on matplotlib: pictures for a logger, or SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlssl.drawing.words import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[Sequence[float], Sequence[float]]
"""x and y of the same length."""

SIZE = (5.0, 2.9)  # inches; with letters of 9 points a figure can be read on a phone's width too
INK, RULE, MUTED = "#1c1d21", "#d3d5da", "#9a9ca5"
SERIES = ("#1f6feb", "#d9480f", "#2b8a3e", "#9c36b5", "#0b7285", "#e67700", "#c2255c", "#5c5f66")
"""Colours told apart also where red and green are not, dark enough for a white page; a dark one has its own."""

KINDS = {"same_block": "same block", "same_image": "same image, other block", "other_image": "other image"}


def figure_of_curves(
    curves: Mapping[str, Curve], ylabel: str, xlabel: str = "step", levels: Mapping[str, float] | None = None
) -> Figure:
    """Lines over the steps or epochs of a run.

    Args:
        curves: Name → x and y.
        ylabel: With its unit.
        xlabel: With its unit.
        levels: Name → a value to compare with, drawn dashed.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure()
    for number, (name, (x, y)) in enumerate(curves.items()):
        marker = "o" if len(x) <= 30 else ""
        axes.plot(x, y, color=SERIES[number % len(SERIES)], label=name, linewidth=1.6, marker=marker, markersize=3.5)
    for number, (name, value) in enumerate((levels or {}).items()):
        axes.axhline(
            value, color=SERIES[(len(curves) + number) % len(SERIES)], label=name, linestyle="--", linewidth=1.2
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    at = [place for x, _ in curves.values() for place in x]
    if at and min(at) == max(at):
        axes.set_xlim(at[0] - 1, at[0] + 1)
    axes.set_xlabel(plain(xlabel))
    axes.set_ylabel(plain(ylabel))
    _legend(axes)
    return figure


def figure_of_cosines(moments: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Histograms of the cosines of pairs of views, a row for each moment, a colour for each kind of pair.

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
    """How much of the features lies along each direction, from the strongest one down.

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


def figure_of_classes(precisions: Mapping[str, Tensor]) -> Figure:
    """Average precision of each class, sorted by the last of the backbones; classes without a positive are left out.

    Args:
        precisions: Name of a backbone → (L,) in 0–1, NaN for a class that is not shown.
    """
    last = list(precisions.values())[-1]
    order = last.nan_to_num(-1).argsort(descending=True)
    order = order[last[order].isfinite()]
    figure, axes = _figure()
    for number, (name, values) in enumerate(precisions.items()):
        colour = SERIES[1 - number % 2]
        heights, at = values[order].tolist(), range(len(order))
        if number == len(precisions) - 1:
            axes.bar(at, heights, color=colour, alpha=0.6, label=name, width=0.8)
        else:
            ends = [place - 0.4 for place in at], [place + 0.4 for place in at]
            axes.hlines(heights, *ends, colors=colour, label=name, linewidth=2, zorder=3)
    axes.set_ylim(0, 1)
    axes.set_xticks([])
    axes.set_xlabel(f"{len(order)} classes, sorted")
    axes.set_ylabel("average precision")
    _legend(axes)
    return figure


def figure_of_map(places: Tensor, shares: tuple[float, float], groups: Sequence[int], names: Sequence[str]) -> Figure:
    """Images as points in two dimensions, coloured by a label that they show.

    Args:
        places: (n, 2) of `mlssl.evaluation.geometry.map_2d`.
        shares: Of the variance along both axes, 0–1.
        groups: (n,): place in `names`, or −1 for none of them.
        names: At most 8 labels, the first of which an image shows gives its colour.
    """
    figure, axes = _figure(size=(5.0, 4.4))
    colours = [SERIES[group] if group >= 0 else MUTED for group in groups]
    points = axes.scatter(places[:, 0].tolist(), places[:, 1].tolist(), c=colours, s=13, linewidths=0)
    points.set_gid("points")
    for number, name in enumerate(names):
        axes.scatter([], [], color=SERIES[number], s=16, label=name)
    if names and -1 in groups:
        axes.scatter([], [], color=MUTED, s=16, label="others")
    axes.set_xlabel(f"1st direction ({shares[0]:.0%} of the variance)")
    axes.set_ylabel(f"2nd direction ({shares[1]:.0%})")
    _legend(axes, columns=3)
    return figure


def svg(figure: Figure, name: str) -> str:
    """A figure as an `<svg>` element whose colours are the variables of the page's style.

    Args:
        figure: Of this module.
        name: Letters and dashes; goes in front of every id, so that several figures fit on one page.
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
    # Letters take the page's font, whatever matplotlib measured them with.
    return re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)


def _variables() -> dict[str, str]:
    series = {colour: f"--series-{number}" for number, colour in enumerate(SERIES)}
    return {INK: "--ink", RULE: "--rule", MUTED: "--muted", **series}


def _figure(rows: int = 1, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    for axes in figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]:
        axes.grid(color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, labelsize=8, length=0)
        axes.xaxis.label.set(color=INK, size=9)
        axes.yaxis.label.set(color=INK, size=9)
        for side, line in axes.spines.items():
            line.set_visible(side in ("left", "bottom"))
            line.set_color(RULE)
    return figure, figure.axes[0]


def _legend(axes: Axes, columns: int | None = None) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = columns or (len(labels) if sum(map(len, labels)) < 48 else 2)
        axes.legend(
            handles,
            [plain(label) for label in labels],
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=columns,
            frameon=False,
            fontsize=8,
            labelcolor=INK,
            borderaxespad=0.2,
            handlelength=1.4,
            columnspacing=1.2,
        )
