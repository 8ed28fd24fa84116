"""Figures of what a backbone finds similar: blocks of an image, and images or blocks of others."""

from __future__ import annotations

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
    from matplotlib.figure import Figure


def draw_similarities(
    image: ImageArray,
    boxes: Sequence[Box],
    similarities: Similarities,
    path: str | os.PathLike[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the cosines of the blocks as a table, and for each block a heat map over the picture.

    Args:
        image: RGB, uint8 (H, W, 3).
        boxes: The K blocks.
        similarities: Of :func:`block_similarities`.
        path: PNG to write; None writes nothing.
        title: A line above the picture.

    Returns:
        The figure, which a notebook shows.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    number = len(boxes)
    columns = min(4, number)
    rows = -(-number // columns)
    height, width = image.shape[:2]
    panel = 2.6
    figure = Figure(
        figsize=(panel * (columns + 1.25), panel * rows * min(1.3, height / width) + 0.9), layout="constrained"
    )
    if title:
        figure.suptitle(plain(title), fontsize=10)
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.25, columns))
    table_part, maps_part = parts
    table = table_part.subplots()
    low, high = similarities.maps.min().item(), similarities.maps.max().item()
    values = similarities.blocks.cpu().numpy()
    table.imshow(values, cmap="viridis", vmin=values.min().item(), vmax=1)
    table.set(xticks=range(number), yticks=range(number), xlabel="block", ylabel="block")
    table.set_title("cosine of two blocks", fontsize=9)
    if number <= 9:
        middle = (values.min().item() + 1) / 2
        for row, column in np.ndindex(number, number):
            value = values[row, column].item()
            table.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="w" if value < middle else "k"
            )
    grid = maps_part.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        axes.set_axis_off()
        if place >= number:
            continue
        gray = image @ np.array([0.299, 0.587, 0.114])
        axes.imshow(gray, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
        drawn = axes.imshow(
            similarities.maps[place].cpu().numpy(),
            cmap="turbo",
            alpha=0.5,
            vmin=low,
            vmax=high,
            extent=(0, width, height, 0),
            interpolation="bilinear",
        )
        box = boxes[place]
        axes.add_patch(
            Rectangle((box.left, box.top), box.width, box.height, fill=False, edgecolor="white", linewidth=2)
        )
        axes.set_title(f"like block {place}", fontsize=9)
    maps_part.colorbar(drawn, ax=grid, shrink=0.8, label="cosine").solids.set_alpha(1)
    _save(figure, path)
    return figure


def draw_similar(
    image: ImageArray,
    box: Box | None,
    records: Records,
    found: Similar,
    path: str | os.PathLike[str] | None = None,
    title: str = "",
) -> Figure:
    """Draw an image and what was found for it, nearest first, with the blocks framed where blocks were compared.

    Args:
        image: RGB, uint8 (H, W, 3).
        box: Block of the image that was compared; None for the whole.
        records: Images that were searched.
        found: Of :func:`find_similar`.
        path: PNG to write; None writes nothing.
        title: Below the image itself.

    Returns:
        The figure, which a notebook shows.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = min(5, len(found.lines) + 1)
    rows = -(-(len(found.lines) + 1) // columns)
    figure = Figure(figsize=(2.1 * columns, 1.95 * rows), layout="constrained")
    pictures = [(image, box, title)]
    for line, other, cosine in zip(*found, strict=True):
        pictures.append((records.image(line), other if box else None, f"{cosine:.3f}  {records.path(line).name}"))
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for place, (axes, (pixels, frame, words)) in enumerate(zip(figure.axes, pictures, strict=False)):
        axes.imshow(pixels)
        axes.set_title(plain(words[:26]), fontsize=8, fontweight="bold" if place == 0 else "normal")
        if frame:
            corner, width, height = (frame.left, frame.top), frame.width - 1, frame.height - 1
            axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="#f07800", linewidth=2.5))
    _save(figure, path)
    return figure


def _save(figure: Figure, path: str | os.PathLike[str] | None) -> None:
    if path is not None:
        with written_aside(path) as aside:
            figure.savefig(aside, dpi=110)
