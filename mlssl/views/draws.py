"""What chance decides about a view: from a recipe and uniform numbers to operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Literal, NamedTuple

from mlssl.views.photometric import REFERENCE_SIZE, Recipe

Jitter = Literal["brightness", "contrast", "saturation", "hue"]

CROP_ATTEMPTS = 10
"""Draws of a crop before the largest one in the middle is taken; torchvision's number."""

CROP_UNIFORMS = 2 * CROP_ATTEMPTS + 2
"""Numbers that a crop is drawn from."""

NUM_UNIFORMS = CROP_UNIFORMS + 11
"""Numbers that one view is drawn from, however many of them it needs: no draw depends on what another one was."""

_ORDERS: tuple[tuple[Jitter, ...], ...] = tuple(permutations(("brightness", "contrast", "saturation", "hue")))


class Operations(NamedTuple):
    """What is done to one view, in this order.

    Attributes:
        top: First line of the crop in the block.
        left: First column.
        height: Lines of the crop, at least 1.
        width: Columns, at least 1.
        jitters: Operations in their order, each with its factor; of the hue, its shift in turns of the colour circle.
        gray: Whether the colours are taken out.
        blur_sigma: In pixels of the view; 0 for none.
        solarize_from: Values of at least this are inverted; None for none.
        flip: Whether left and right change places.
    """

    top: int
    left: int
    height: int
    width: int
    jitters: tuple[tuple[Jitter, float], ...] = ()
    gray: bool = False
    blur_sigma: float = 0.0
    solarize_from: int | None = None
    flip: bool = False


def draw_operations(recipe: Recipe, height: int, width: int, size: int, uniforms: Sequence[float]) -> Operations:
    """Draw what is done to a view of a block.

    Args:
        recipe: Of the branch.
        height: Of the block in pixels, at least 1.
        width: Likewise.
        size: Side S of the view, which the blur's σ scales with.
        uniforms: `NUM_UNIFORMS` numbers, each in 0–1 without 1.
    """
    values = uniforms[CROP_UNIFORMS:]
    jittered, order, brightness, contrast, saturation, hue, grayed, blurred, sigma, solarized, flipped = values
    factors: dict[Jitter, float] = {
        "brightness": _between(1 - recipe.brightness, 1 + recipe.brightness, brightness),
        "contrast": _between(1 - recipe.contrast, 1 + recipe.contrast, contrast),
        "saturation": _between(1 - recipe.saturation, 1 + recipe.saturation, saturation),
        "hue": _between(-recipe.hue, recipe.hue, hue),
    }
    names = _ORDERS[int(order * len(_ORDERS))] if jittered < recipe.jitter_probability else ()
    return Operations(
        *draw_crop(recipe.crop_area, recipe.crop_aspect, height, width, uniforms),
        jitters=tuple((name, factors[name]) for name in names),
        gray=grayed < recipe.gray_probability,
        blur_sigma=_between(*recipe.blur_sigma, sigma) * size / REFERENCE_SIZE
        if blurred < recipe.blur_probability
        else 0,
        solarize_from=recipe.solarize_threshold if solarized < recipe.solarize_probability else None,
        flip=flipped < recipe.flip_probability,
    )


def draw_crop(
    areas: tuple[float, float], aspects: tuple[float, float], height: int, width: int, uniforms: Sequence[float]
) -> tuple[int, int, int, int]:
    """Draw the first crop that fits; else take the largest of an allowed aspect in the middle, as torchvision does.

    Args:
        areas: Smallest and largest, as shares of the image.
        aspects: Smallest and largest width ÷ height, log-uniform.
        height: Of the image in pixels, at least 1.
        width: Likewise.
        uniforms: At least `CROP_UNIFORMS` numbers, each in 0–1 without 1.

    Returns:
        Top, left, height and width.
    """
    narrowest, widest = aspects
    for attempt in range(CROP_ATTEMPTS):
        area = height * width * _between(*areas, uniforms[2 * attempt])
        aspect = math.exp(_between(math.log(narrowest), math.log(widest), uniforms[2 * attempt + 1]))
        crop_height, crop_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            down, right = uniforms[2 * CROP_ATTEMPTS : CROP_UNIFORMS]
            return (
                int(down * (height - crop_height + 1)),
                int(right * (width - crop_width + 1)),
                crop_height,
                crop_width,
            )
    aspect = min(max(width / height, narrowest), widest)
    crop_height, crop_width = min(height, max(1, round(width / aspect))), min(width, max(1, round(height * aspect)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _between(low: float, high: float, uniform: float) -> float:
    return low + (high - low) * uniform
