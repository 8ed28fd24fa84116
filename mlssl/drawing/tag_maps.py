"""Draw an image with a heat map for each of its labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from mlssl.atomic import written_aside
from mlssl.data.decoding import ImageArray
from mlssl.drawing.words import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LABELS = 11
"""Maximum number of labels in a figure, the most probable ones."""

MAX_SIDE = 480
"""Maximum height and width of the drawn image in pixels; a panel is about 290 pixels wide."""


def draw_tag_maps(
    image: ImageArray,
    names: Sequence[str],
    probabilities: Sequence[float],
    maps: Tensor,
    path: str | os.PathLike[str] | None = None,
    title: str = "",
) -> Figure:
    """Draw an image, and one map per label over it, all on one scale of logits around 0.

    Args:
        image: RGB, uint8 (H, W, 3).
        names: k labels, most probable first; more than 11 are left out.
        probabilities: Probability of each label.
        maps: (k, h, w), logits of each label at each position.
        path: PNG to write; None writes nothing.
        title: Title of the image.

    Returns:
        The figure, which a notebook shows.
    """
    from matplotlib.figure import Figure

    shown = min(len(names), MOST_LABELS)
    columns = min(4, shown + 1)
    rows = -(-(shown + 1) // columns)
    small = Image.fromarray(image)
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    image = np.asarray(small)
    height, width = image.shape[:2]
    figure = Figure(figsize=(2.6 * columns, 2.6 * rows * min(1.5, height / width) + 0.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    panels.flat[0].imshow(image)
    panels.flat[0].set_title(plain(title[:40] or "photograph"), fontsize=8, fontweight="bold")
    if not shown:
        panels.flat[0].text(
            0.5, -0.04, "no label", transform=panels.flat[0].transAxes, ha="center", va="top", fontsize=8
        )
    largest = maps[:shown].abs().max().item() if shown else 1.0
    gray = image @ np.array([0.299, 0.587, 0.114])
    for index in range(shown):
        axes = panels.flat[index + 1]
        axes.imshow(gray, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
        drawn = axes.imshow(
            maps[index].numpy(),
            cmap="RdBu_r",
            alpha=0.55,
            vmin=-largest,
            vmax=largest,
            extent=(0, width, height, 0),
            interpolation="bilinear",
        )
        axes.set_title(plain(f"{names[index][:30]}  {probabilities[index]:.2f}"), fontsize=8)
    if shown:
        scale: Any = figure.colorbar(drawn, ax=panels, shrink=0.7, label="logit at the position")
        scale.solids.set_alpha(1)
    if path is not None:
        with written_aside(path) as aside:
            figure.savefig(aside, dpi=110, format="png")
    return figure
