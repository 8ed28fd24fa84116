"""`mlssl views`: see what the network will see."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlssl.data.decoding import decode_rgb
from mlssl.drawing.similar import draw_similarities
from mlssl.evaluation.similar import block_similarities
from mlssl.views.blocks import BlockViews
from mlssl.visualize import draw_view_grid
from mlssl.weights.sources import open_backbone


def views(
    image: Path,
    size: int = 224,
    rows: int = 2,
    cols: int = 2,
    overlap: float = 0.2,
    backbone: str | None = None,
    seed: int = 0,
    output: Path = Path("views.png"),
) -> None:
    """Draw an image with its blocks, and every view of every block; and which of its parts a backbone finds alike.

    Example: mlssl views photo.jpg -o views.png --backbone last.ckpt

    Args:
        image: File to read.
        size: Side of a view in pixels.
        rows: Rows of the block grid.
        cols: Columns of the block grid.
        overlap: Share of the image side by which blocks overlap, 0–0.5.
        backbone: Checkpoint, exported file, NAME=FILE, or a name, which is then untrained: draws OUTPUT-alike.png,
            how alike it finds the blocks, and where in the picture it finds what is like each.
        seed: Of the augmentation and of untrained weights.
        output: PNG to write; an existing one is replaced.
    """
    cut = BlockViews(size, rows, cols, overlap)
    pixels = decode_rgb(image)
    drawn = cut(pixels, np.random.default_rng(seed))
    boxes = cut.boxes(*pixels.shape[:2])
    draw_view_grid(pixels, drawn, boxes, path=output, title=image.name)
    print(f"{output}: {image.name} with {cut.num_blocks} blocks and {cut.num_blocks * cut.num_branches} views")
    if backbone is not None:
        alike = output.with_name(f"{output.stem}-alike.png")
        similarities = block_similarities(open_backbone(backbone, seed=seed), pixels, boxes, size)
        draw_similarities(pixels, boxes, similarities, alike, f"{image.name} under {Path(backbone).name}")
        print(f"{alike}: which parts of it are alike")
