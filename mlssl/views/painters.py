"""Render one branch at one size, and check the output of custom branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mlssl.views.draws import CROP_UNIFORMS, NUM_UNIFORMS, draw_crop, draw_operations
from mlssl.views.pixels import Renderer
from mlssl.views.recipe import Recipe
from mlssl.views.streams import Streams

Pixels: TypeAlias = npt.NDArray[np.uint8]

Shown: TypeAlias = tuple[float, float, float, float]
"""Top, left, height and width of a view's crop, as fractions of its block."""

WHOLE: Shown = (0.0, 0.0, 1.0, 1.0)

_SLACK = 1e-6
"""Tolerance for computed fractions outside 0–1."""


class RecipePainter:
    """Renders views of a Recipe at the renderer's size."""

    def __init__(self, recipe: Recipe, renderer: Renderer) -> None:
        self.recipe = recipe
        self.renderer = renderer

    def randomness(self, streams: Streams, root: int, branch: int, blocks: int) -> list[list[float]]:
        """Uniform numbers for each block of a branch."""
        return streams.uniforms(root, branch, blocks, NUM_UNIFORMS)

    def __call__(self, block: Pixels, randomness: Any, out: Pixels) -> Shown:
        """Render a view (C, S, S) of a block (H, W, C), and return its crop."""
        height, width = block.shape[:2]
        operations = draw_operations(self.recipe, height, width, self.renderer.size, randomness)
        self.renderer(block, operations, out)
        return operations.top / height, operations.left / width, operations.height / height, operations.width / width


class CustomPainter:
    """Renders views of any other branch, which gets a copy of the block and cannot affect other views.

    Args:
        branch: A function of block and generator.
        name: Its name in errors.
        crop: Areas and aspects of a random crop passed to the branch instead of the block; None for the block.
    """

    def __init__(
        self,
        branch: Callable[[Pixels, np.random.Generator], Any],
        name: str,
        crop: tuple[tuple[float, float], tuple[float, float]] | None = None,
    ) -> None:
        self.branch = branch
        self.name = name
        self.crop = crop

    def randomness(self, streams: Streams, root: int, branch: int, blocks: int) -> list[np.random.Generator]:
        """A generator for each block of a branch."""
        return [streams.generator(root, branch, block) for block in range(blocks)]

    def __call__(self, block: Pixels, randomness: Any, out: Pixels) -> Shown:
        """Render a view (C, S, S) of a block (H, W, C), and return its crop."""
        part, shown_part = block, WHOLE
        if self.crop is not None:
            rows, columns = block.shape[:2]
            uniforms = randomness.random(CROP_UNIFORMS).tolist()
            top, left, height, width = draw_crop(*self.crop, rows, columns, uniforms)
            part = block[top : top + height, left : left + width]
            shown_part = (top / rows, left / columns, height / rows, width / columns)
        pixels, shown = _checked(self.branch(part.copy(), randomness), self.name, out.shape)
        out[:] = pixels
        return within(shown_part, shown)


Painter: TypeAlias = RecipePainter | CustomPainter


def try_branch(branch: Callable[[Pixels, np.random.Generator], Any], name: str, size: int, channels: int) -> None:
    """Call a branch that is not a Recipe once, on a blank block, and check its output.

    Raises:
        ValueError: It fails, or returns a wrong shape or a box outside 0–1.
        TypeError: It returns no pixels, or pixels of the wrong type.
    """
    # Not square and not the size of a view, so that a branch that does not resize fails.
    blank = np.zeros((size + 16, size + 32, channels), np.uint8)
    try:
        given = branch(blank, np.random.default_rng(0))
    except Exception as error:
        raise ValueError(
            f"{name} fails on a blank block, uint8 {blank.shape}, with a generator "
            f"({type(error).__name__}: {' '.join(str(error).split())}): correct it, or pass another"
        ) from error
    _checked(given, name, (channels, size, size))


def within(outer: Shown, inner: Shown) -> Shown:
    """Box of `inner`, relative to `outer`, in the whole, as fractions."""
    top, left, height, width = outer
    return top + inner[0] * height, left + inner[1] * width, inner[2] * height, inner[3] * width


def _checked(given: Any, name: str, shape: tuple[int, ...]) -> tuple[Pixels, Shown]:
    """Checked pixels and box of a branch's output."""
    pixels, shown = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not hasattr(pixels, "dtype") or not hasattr(pixels, "shape"):
        raise TypeError(
            f"{name} returns {_described(given)}, expected uint8 {shape}: return the view's pixels (C, S, S)"
        )
    if str(pixels.dtype).removeprefix("torch.") != "uint8":
        raise TypeError(f"{name} returns {pixels.dtype}, expected uint8 {shape}: do not normalise the pixels")
    if tuple(pixels.shape) != shape:
        raise ValueError(
            f"{name} returns pixels of shape {tuple(pixels.shape)}, expected {shape}: end it with a resize to the size "
            "of the views, channels first"
        )
    return np.asarray(pixels), WHOLE if shown is None else _checked_box(shown, name)


def _checked_box(given: Any, name: str) -> Shown:
    try:
        top, left, height, width = (float(value) for value in given)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} returns {_described(given)} as the box of its view, expected four numbers: top, left, height and "
            "width "
            "as fractions of the block"
        ) from None
    inside = top >= 0 and left >= 0 and top + height <= 1 + _SLACK and left + width <= 1 + _SLACK
    if not (inside and height > 0 and width > 0):
        raise ValueError(
            f"{name} returns the box {(top, left, height, width)}, expected top, left, height and width of the view's "
            "crop as fractions of the block, inside 0–1: divide pixels by the block's sides"
        )
    return top, left, height, width


def _described(given: object) -> str:
    return "nothing" if given is None else f"an object of type {type(given).__name__}"
