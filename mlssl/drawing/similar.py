"""Figures of similarities: between blocks of an image, and to other images or their blocks."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlssl.atomic import written_aside
from mlssl.data.decoding import ImageArray
from mlssl.data.records import Records
from mlssl.drawing.words import plain
from mlssl.evaluation.similar import Similar, Similarities
from mlssl.views.grid import Box

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MAP_OPACITY = 0.45
"""Opacity of heat maps, so that the image stays visible."""


def draw_similarities(
    image: ImageArray,
    boxes: Sequence[Box],
    similarities: Similarities,
    path: str | os.PathLike[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the image with its blocks, a table of their cosines, and one heat map per block.

    One scale of colours is for all.

    Args:
        image: RGB, uint8 (H, W, 3).
        boxes: The K blocks.
        similarities: Output of :func:`block_similarities`.
        path: PNG to write; None to write nothing.
        title: Line above the image.

    Returns:
        The figure, which a notebook shows.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    number = len(boxes)
    columns = min(4, math.ceil(number**0.5))
    rows = -(-number // columns)
    height, width = image.shape[:2]
    panel = 2.6
    figure = Figure(
        figsize=(panel * (columns + 1.25), max(5.2, panel * rows * min(1.3, height / width) + 0.9)),
        layout="constrained",
    )
    if title:
        figure.suptitle(plain(title), fontsize=10)
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.25, columns))
    left_part, maps_part = parts
    photograph, table = left_part.subplots(2, 1)
    photograph.imshow(image)
    photograph.set_axis_off()
    for index, box in enumerate(boxes):
        photograph.add_patch(
            Rectangle((box.left, box.top), box.width, box.height, fill=False, edgecolor="white", linewidth=1)
        )
        photograph.text(*_middle(box), str(index), color="w", ha="center", va="center", fontweight="bold")
    # One scale for all: a colour means the same cosine in the table and on every map.
    values = similarities.blocks.cpu().numpy()
    scale = {"cmap": "viridis", "vmin": min(values.min().item(), similarities.maps.min().item()), "vmax": 1}
    table.imshow(values, **scale)
    table.set(xticks=range(number), yticks=range(number), xlabel="block", ylabel="block")
    table.set_title("cosine of two blocks", fontsize=9)
    if number <= 9:
        middle = (scale["vmin"] + 1) / 2
        for row, column in np.ndindex(number, number):
            value = values[row, column].item()
            table.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="w" if value < middle else "k"
            )
    grid = maps_part.subplots(rows, columns, squeeze=False)
    gray = image @ np.array([0.299, 0.587, 0.114])
    for index, axes in enumerate(grid.flat):
        axes.set_axis_off()
        if index >= number:
            continue
        axes.imshow(gray, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
        drawn = axes.imshow(
            similarities.maps[index].cpu().numpy(),
            alpha=MAP_OPACITY,
            extent=(0, width, height, 0),
            interpolation="bilinear",
            **scale,
        )
        box = boxes[index]
        axes.add_patch(
            Rectangle((box.left, box.top), box.width, box.height, fill=False, edgecolor="white", linewidth=2)
        )
        axes.set_title(f"like block {index}", fontsize=9)
    maps_part.colorbar(drawn, ax=grid, shrink=0.8, label="cosine, also of the table").solids.set_alpha(1)
    _save(figure, path)
    return figure


def draw_similar(
    image: ImageArray,
    box: Box | None,
    records: Records,
    found: Similar,
    path: str | os.PathLike[str] | None = None,
    title: str = "",
    remarks: Sequence[str] = (),
) -> Figure:
    """Draw an image, and to its right the images found, nearest first; compared blocks are framed.

    Args:
        image: RGB, uint8 (H, W, 3).
        box: Block of the image that was compared; None for the whole.
        records: The searched images.
        found: Output of :func:`find_similar`.
        path: PNG to write; None to write nothing.
        title: Line below the image.
        remarks: One per image found, such as "identical file"; empty for none.

    Returns:
        The figure, which a notebook shows.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(4, len(found.indices))
    rows = -(-len(found.indices) // columns)
    figure = Figure(figsize=(2.1 * (columns + 1.6), max(2.6, 2.1 * rows)), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.6, columns))
    query = parts[0].subplots()
    _draw_picture(query, image, box, f"query\n{title}", bold=True)
    figure.add_artist(Line2D(2 * [1.6 / (columns + 1.6)], [0.03, 0.97], color="#9a9ca5", linewidth=1))
    grid = parts[1].subplots(rows, columns, squeeze=False).flat
    for axes in grid:
        axes.set_axis_off()
    remarks = remarks or [""] * len(found.indices)
    for axes, line, other, cosine, remark in zip(parts[1].axes, *found, remarks, strict=False):
        words = f"{cosine:.3f}  {records.path(line).name}"
        _draw_picture(axes, records.image(line), other if box else None, words, remark)
    _save(figure, path)
    return figure


def _draw_picture(
    axes: Axes, pixels: ImageArray, frame: Box | None, words: str, remark: str = "", *, bold: bool = False
) -> None:
    """An image with text above it and a remark on it."""
    from matplotlib.patches import Rectangle

    axes.set_axis_off()
    axes.imshow(pixels)
    shown = "\n".join(line[:28] for line in words.split("\n"))
    axes.set_title(plain(shown), fontsize=8, fontweight="bold" if bold else "normal")
    if frame:
        corner, width, height = (frame.left, frame.top), frame.width - 1, frame.height - 1
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="#f07800", linewidth=2.5))
    if remark:
        axes.text(
            *(0.5, 0.04), plain(remark), transform=axes.transAxes, ha="center", va="bottom", fontsize=8, color="white",
            bbox={"facecolor": "#c01c28", "edgecolor": "none", "pad": 2},
        )  # fmt: skip


def _middle(box: Box) -> tuple[float, float]:
    return box.left + box.width / 2, box.top + box.height / 2


def _save(figure: Figure, path: str | os.PathLike[str] | None) -> None:
    if path is not None:
        with written_aside(path) as aside:
            figure.savefig(aside, dpi=110)
