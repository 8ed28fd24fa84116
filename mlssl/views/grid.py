"""Positions of the overlapping blocks of an image: integers in, integers out."""

from __future__ import annotations

import math
from typing import NamedTuple

MAX_OVERLAP = 0.5


class Box(NamedTuple):
    """A pixel rectangle: rows `top` to `top + height`, columns `left` to `left + width`, ends excluded."""

    top: int
    left: int
    height: int
    width: int


def block_grid(height: int, width: int, rows: int = 2, cols: int = 2, overlap: float = 0.2) -> list[Box]:
    """Cut an image into rows × cols overlapping blocks of one size (arXiv 2506.23156, block-wise augmentation).

    A block is (1/rows + overlap) of the height and (1/cols + overlap) of the width, rounded half up, at least one pixel
    and at most the whole side. The first block starts at 0, the last ends at the image's edge, the others are evenly
    spaced. 1 × 1 is the whole image for any overlap. An image with fewer pixels than blocks gives identical blocks.

    Args:
        height: Image height in pixels, at least 1.
        width: Image width in pixels, at least 1.
        rows: At least 1; 2 in the paper.
        cols: At least 1; 2 in the paper.
        overlap: Fraction of the image side, 0 to 0.5; 0.2 in the paper, 0.3 in its author's run on COCO.

    Returns:
        The K = rows · cols blocks, row-major; for 2 × 2 top-left, top-right, bottom-left, bottom-right.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> block_grid(10, 20)[-1]
        Box(top=3, left=6, height=7, width=14)
    """
    if height < 1 or width < 1:
        raise ValueError(
            f"got an image of height {height} and width {width}, expected at least one pixel each: pass "
            "block_grid(height, width) in pixels"
        )
    if rows < 1 or cols < 1:
        raise ValueError(
            f"got a grid of rows={rows} and cols={cols}, expected at least 1 of each: "
            "pass rows=2, cols=2 for four blocks or rows=1, cols=1 for the whole image"
        )
    if not 0 <= overlap <= MAX_OVERLAP:
        raise ValueError(
            f"got overlap={overlap}, expected a fraction of the image's side between 0 and {MAX_OVERLAP}: "
            "pass overlap=0.2 for blocks of 70 % of each side in a 2 × 2 grid"
        )
    block_height, block_width = _block_side(height, rows, overlap), _block_side(width, cols, overlap)
    return [
        Box(top, left, block_height, block_width)
        for top in _starts(height, block_height, rows)
        for left in _starts(width, block_width, cols)
    ]


def _block_side(side: int, count: int, overlap: float) -> int:
    return min(side, max(1, math.floor((1 / count + overlap) * side + 0.5)))


def _starts(side: int, block_side: int, count: int) -> list[int]:
    if count == 1:
        return [0]
    return [i * (side - block_side) // (count - 1) for i in range(count)]
