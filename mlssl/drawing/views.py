"""Draw an image with its blocks and views."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from mlssl.atomic import written_aside
from mlssl.data.decoding import ImageArray
from mlssl.views.grid import Box

if TYPE_CHECKING:
    from torch import Tensor

Views: TypeAlias = "npt.NDArray[np.uint8] | Tensor"

COLOURS = ("#e6194b", "#0a6cff", "#1f9d2f", "#f07800", "#8b3fd9", "#008f8f", "#d63fb0", "#8c5a2b")
"""Block colours, reused cyclically; distinct, and dark enough for white digits."""

CELL = 160  # all lengths in pixels: side of a drawn view
FRAME = 4  # around a view
LINE = 3  # of a block's rectangle
GAP = 14
TEXT = 15
ENLARGED = 1.05
"""Enlargement from which a view is marked as enlarged."""

WIDEST = 2.0  # width of the image, relative to the height of all rows of views


def draw_view_grid(
    image: ImageArray,
    views: Views,
    boxes: Sequence[Box | tuple[int, int, int, int]],
    path: str | os.PathLike[str] | None = None,
    title: str | None = None,
    channels: tuple[int, int, int] = (0, 1, 2),
    local_views: Views | None = None,
    enlarged: npt.NDArray[np.float64] | None = None,
) -> ImageArray:
    """Draw an image with its blocks, and next to it the views: one row per branch, one column per block.

    The rectangle, the number and the views of a block have one colour. Rectangles are drawn one a little inside the
    other, because blocks share edges.

    Args:
        image: RGB or C other channels, uint8 (H, W, C).
        views: uint8 (A, K, C, S, S) from `BlockViews`, an array or tensor.
        boxes: The K blocks of the image from `BlockViews.boxes`.
        path: File to write, in the format of its suffix (.png, .jpg); missing folders are created. None writes nothing.
        title: Lines above the figure; lines that are too wide are cut off.
        channels: Channels drawn as red, green and blue if C is 3 or more; otherwise the first is drawn gray.
        local_views: uint8 (V, C, s, s), drawn in further rows of K, smaller than the views but at least half as large.
        enlarged: (A, K) from `enlargements`, printed on each enlarged view.

    Returns:
        The picture, RGB, uint8 (height, width, 3).

    Raises:
        ValueError: Image, views or boxes have a wrong shape or dtype, or do not match.

    Example:
        >>> views = np.zeros((2, 1, 3, 32, 32), np.uint8)
        >>> picture = draw_view_grid(np.zeros((40, 60, 3), np.uint8), views, [Box(0, 0, 40, 60)])
        >>> picture.dtype, picture.shape[2]
        (dtype('uint8'), 3)
    """
    pixels = np.asarray(views)
    small = np.empty((0, *pixels.shape[2:]), np.uint8) if local_views is None else np.asarray(local_views)
    _check(image, pixels, small, boxes, channels)
    shown = list(channels) if image.shape[2] >= 3 else [0, 0, 0]
    image, pixels, small = image[:, :, shown], pixels[:, :, shown], small[:, shown]
    font = ImageFont.load_default(TEXT)
    branches, blocks = pixels.shape[:2]
    colours = [COLOURS[block % len(COLOURS)] for block in range(blocks)]
    lines = branches + -(-len(small) // blocks)
    rows = lines * (CELL + GAP) - GAP
    overview = _overview(image, [Box(*box) for box in boxes], colours, (rows, round(WIDEST * rows)))

    names = [f"branch {branch}" for branch in range(branches)] + ["local" for _ in range(lines - branches)]
    above = title.replace("×", "x").split("\n") if title else []  # missing in Pillow's default font
    top = GAP + (1 + len(above)) * (TEXT + GAP // 2)
    left = GAP + overview.width + 2 * GAP
    first = left + round(max(font.getlength(name) for name in names)) + GAP  # left edge of the first column of views
    sheet = Image.new("RGB", (first + blocks * (CELL + GAP), top + rows + GAP), "white")
    sheet.paste(overview, (GAP, top))
    draw = ImageDraw.Draw(sheet)
    for number, words in enumerate(above):
        draw.text((GAP, GAP + number * (TEXT + GAP // 2)), words, "black", font)
    for line, name in enumerate(names):
        draw.text((left, top + line * (CELL + GAP) + CELL / 2), name, "black", font, anchor="lm")
    for block in range(blocks):
        x = first + block * (CELL + GAP)
        draw.text((x + CELL / 2, top - GAP // 2), f"block {block}", colours[block], font, anchor="ms")
        for branch in range(branches):
            y = top + branch * (CELL + GAP)
            draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), colours[block])
            sheet.paste(_drawn(pixels[branch, block], CELL - 2 * FRAME), (x + FRAME, y + FRAME))
            if enlarged is not None and enlarged[branch, block] > ENLARGED:
                _draw_tag(draw, x, y + CELL, f"x {enlarged[branch, block]:.1f}", colours[block], font)
    side = min(CELL, max(CELL // 2, round(CELL * small.shape[-1] / pixels.shape[-1])))
    for number, view in enumerate(small):
        line, block = branches + number // blocks, number % blocks
        sheet.paste(_drawn(view, side), (first + block * (CELL + GAP), top + line * (CELL + GAP) + (CELL - side) // 2))

    if path is not None:
        with written_aside(path) as aside:
            sheet.save(aside)
    return np.asarray(sheet)


def enlargements(shown: npt.NDArray[Any], height: int, width: int, size: int) -> npt.NDArray[np.float64]:
    """Enlargement of each view relative to its crop of the image; below 1 it is reduced.

    Args:
        shown: (A, K, 4), top, left, height and width of the views, as fractions of the image.
        height: Height of the image in pixels.
        width: Likewise.
        size: Side of a view in pixels.

    Returns:
        (A, K), side of the view ÷ root of the area that it shows.

    Example:
        >>> enlargements(np.array([[[0, 0, 0.5, 0.5], [0, 0, 1, 1]]]), 100, 100, 100)
        array([[2., 1.]])
    """
    area = (shown[..., 2] * height).astype(np.float64) * (shown[..., 3] * width)
    sides: npt.NDArray[np.float64] = np.sqrt(np.maximum(area, 1))
    return size / sides


def _draw_tag(draw: ImageDraw.ImageDraw, left: int, bottom: int, words: str, colour: str, font: Any) -> None:
    right, top = left + round(font.getlength(words)) + GAP, bottom - TEXT - GAP // 2
    draw.rectangle((left, top, right, bottom - 1), colour)
    draw.text(((left + right) / 2, (top + bottom) / 2), words, "white", font, anchor="mm")


def _overview(image: ImageArray, boxes: Sequence[Box], colours: Sequence[str], limits: tuple[int, int]) -> Image.Image:
    """The image, as large as the limits (height, width) allow, with its numbered blocks."""
    scale = min(limits[0] / image.shape[0], limits[1] / image.shape[1])
    overview = _resized(image, *(max(1, round(side * scale)) for side in image.shape[:2]))
    draw = ImageDraw.Draw(overview)
    font = ImageFont.load_default(TEXT)
    rows, cols = sorted({box.top for box in boxes}), sorted({box.left for box in boxes})
    corners = []
    for box, colour in zip(boxes, colours, strict=True):
        # Blocks that share an edge are in one row or column of the grid.
        inset = (rows.index(box.top) + cols.index(box.left)) % 4 * (LINE + 1)
        top, left = round(box.top * scale) + inset, round(box.left * scale) + inset
        bottom, right = round((box.top + box.height) * scale) - inset, round((box.left + box.width) * scale) - inset
        if top < bottom and left < right:
            draw.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=LINE)
        corners.append((left, top))
    for block, ((left, top), colour) in enumerate(zip(corners, colours, strict=True)):
        right = left + 2 * TEXT if block > 9 else left + TEXT + GAP // 2
        draw.rectangle((left, top, right, top + TEXT + GAP // 2), colour)
        draw.text(((left + right) / 2, top + (TEXT + GAP // 2) / 2), str(block), "white", font, anchor="mm")
    return overview


def _resized(pixels: ImageArray, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.BICUBIC)


def _drawn(view: npt.NDArray[np.uint8], side: int) -> Image.Image:
    """A view (3, S, S) at another size."""
    return _resized(view.transpose(1, 2, 0), side, side)


def _check(
    image: ImageArray,
    views: npt.NDArray[np.uint8],
    local_views: npt.NDArray[np.uint8],
    boxes: Sequence[object],
    channels: tuple[int, int, int],
) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.size == 0:
        raise ValueError(f"the image is {image.dtype} of shape {image.shape}: pass its pixels, uint8 (H, W, C)")
    if views.dtype != np.uint8 or views.ndim != 5 or views.shape[2] != image.shape[2] or views.size == 0:
        raise ValueError(
            f"the views are {views.dtype} of shape {views.shape}: pass those of one image, "
            f"uint8 (A, K, {image.shape[2]}, S, S)"
        )
    if local_views.dtype != np.uint8 or local_views.ndim != 4 or local_views.shape[1] != image.shape[2]:
        raise ValueError(
            f"the local views are {local_views.dtype} of shape {local_views.shape}: pass those of one image, "
            f"uint8 (V, {image.shape[2]}, s, s)"
        )
    if len(channels) != 3 or (image.shape[2] >= 3 and not all(0 <= one < image.shape[2] for one in channels)):
        raise ValueError(f"channels={channels} of {image.shape[2]} were given: choose three, from 0")
    if len(boxes) != views.shape[1]:
        raise ValueError(
            f"there are {len(boxes)} boxes and views of {views.shape[1]} blocks: give BlockViews.boxes(height, width) "
            "of the BlockViews that made the views"
        )
