"""Sample a view's augmentation parameters from a recipe and uniform random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Literal, NamedTuple

from mlssl.views.recipe import REFERENCE_SIZE, Recipe

Jitter = Literal["brightness", "contrast", "saturation", "hue"]

CROP_ATTEMPTS = 10
"""Samples of a crop before falling back to the largest centre crop; as in torchvision."""

CROP_UNIFORMS = 2 * CROP_ATTEMPTS + 2
"""Uniform numbers per crop."""

_FIRST_EXTRA = CROP_UNIFORMS + 11
_NUM_EXTRA = 8

NUM_UNIFORMS = _FIRST_EXTRA + _NUM_EXTRA + CROP_UNIFORMS
"""Uniform numbers per view. Each has a fixed meaning, and a new operation appends its numbers, so that existing samples
do not change."""

_SEEDS = 2**53
"""Number of distinct values of a uniform number."""

_ORDERS: tuple[tuple[Jitter, ...], ...] = tuple(permutations(("brightness", "contrast", "saturation", "hue")))


class Operations(NamedTuple):
    """The operations of one view, in order.

    Attributes:
        top: First row of the crop in the block.
        left: First column.
        height: Rows of the crop, at least 1.
        width: Columns, at least 1.
        jitters: Operations in order, each with its factor; for hue the shift in turns of the colour circle.
        gray: Whether to convert to gray.
        blur_sigma: σ in pixels of the view; 0 for none.
        solarize_from: Values of at least this are inverted; None for none.
        noise_std: Standard deviation of the noise as a fraction of 255; 0 for none.
        noise_seed: Seed of the noise.
        erased: Top, left, height and width of the erased rectangle of the view; None for none.
        erase_seed: Seed of its pixels.
        flip: Whether left and right are swapped.
        vertical_flip: Whether top and bottom are swapped.
        turns: Quarter turns clockwise, 0 to 3.
    """

    top: int
    left: int
    height: int
    width: int
    jitters: tuple[tuple[Jitter, float], ...] = ()
    gray: bool = False
    blur_sigma: float = 0.0
    solarize_from: int | None = None
    noise_std: float = 0.0
    noise_seed: int = 0
    erased: tuple[int, int, int, int] | None = None
    erase_seed: int = 0
    flip: bool = False
    vertical_flip: bool = False
    turns: int = 0


def draw_operations(recipe: Recipe, height: int, width: int, size: int, uniforms: Sequence[float]) -> Operations:
    """Sample the operations of a view of a block.

    Args:
        recipe: Recipe of the branch.
        height: Height of the block in pixels, at least 1.
        width: Width of the block in pixels, at least 1.
        size: Side S of the view; the blur's σ scales with it.
        uniforms: `NUM_UNIFORMS` numbers in [0, 1).
    """
    values = uniforms[CROP_UNIFORMS:_FIRST_EXTRA]
    jittered, order, brightness, contrast, saturation, hue, grayed, blurred, sigma, solarized, flipped = values
    factors: dict[Jitter, float] = {
        "brightness": _between(1 - recipe.brightness, 1 + recipe.brightness, brightness),
        "contrast": _between(1 - recipe.contrast, 1 + recipe.contrast, contrast),
        "saturation": _between(1 - recipe.saturation, 1 + recipe.saturation, saturation),
        "hue": _between(-recipe.hue, recipe.hue, hue),
    }
    names = _ORDERS[int(order * len(_ORDERS))] if jittered < recipe.jitter_probability else ()
    extra = uniforms[_FIRST_EXTRA : _FIRST_EXTRA + _NUM_EXTRA]
    upturned, turned, turn, noised, noise_std, noise_seed, erased, erase_seed = extra
    return Operations(
        *draw_crop(recipe.crop_area, recipe.crop_aspect, height, width, uniforms),
        jitters=tuple([(name, factors[name]) for name in names if getattr(recipe, name) > 0]),
        gray=grayed < recipe.gray_probability,
        blur_sigma=_between(*recipe.blur_sigma, sigma) * size / REFERENCE_SIZE
        if blurred < recipe.blur_probability
        else 0,
        solarize_from=recipe.solarize_threshold if solarized < recipe.solarize_probability else None,
        noise_std=_between(*recipe.noise_std, noise_std) if noised < recipe.noise_probability else 0,
        noise_seed=int(noise_seed * _SEEDS),
        erased=draw_crop(recipe.erase_area, recipe.erase_aspect, size, size, uniforms[_FIRST_EXTRA + _NUM_EXTRA :])
        if erased < recipe.erase_probability
        else None,
        erase_seed=int(erase_seed * _SEEDS),
        flip=flipped < recipe.flip_probability,
        vertical_flip=upturned < recipe.vertical_flip_probability,
        turns=1 + int(3 * turn) if turned < recipe.turn_probability else 0,
    )


def draw_crop(
    areas: tuple[float, float], aspects: tuple[float, float], height: int, width: int, uniforms: Sequence[float]
) -> tuple[int, int, int, int]:
    """Sample crops and return the first that fits, else the largest centre crop of an allowed aspect, like torchvision.

    Args:
        areas: Minimum and maximum area, as fractions of the image.
        aspects: Minimum and maximum width ÷ height, log-uniform.
        height: Height of the image in pixels, at least 1.
        width: Width of the image in pixels, at least 1.
        uniforms: At least `CROP_UNIFORMS` numbers in [0, 1).

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
