"""`mlssl views`: see what the network will see."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlssl.data.images import decode_rgb
from mlssl.views.blocks import BlockViews
from mlssl.visualize import draw_view_grid


def views(
    image: Path,
    size: int = 224,
    rows: int = 2,
    cols: int = 2,
    overlap: float = 0.2,
    seed: int = 0,
    output: Path = Path("views.png"),
) -> None:
    """Draw an image with its blocks, and every view of every block.

    Args:
        image: File to read.
        size: Side of a view in pixels.
        rows: Rows of the block grid.
        cols: Columns of the block grid.
        overlap: Share of the image side by which blocks overlap, 0–0.5.
        seed: Of the augmentation.
        output: PNG to write; an existing one is replaced.
    """
    cut = BlockViews(size, rows, cols, overlap)
    pixels = decode_rgb(image)
    drawn = cut(pixels, np.random.default_rng(seed))
    draw_view_grid(pixels, drawn, cut.boxes(*pixels.shape[:2]), path=output, title=image.name)
    print(f"{output}: {image.name} with {cut.num_blocks} blocks and {cut.num_blocks * cut.num_branches} views")
