"""Views of images that are not RGB: every step on every channel, and colour steps only for RGB."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mlssl.views.blocks import BlockViews
from mlssl.views.recipe import Recipe

OFF = Recipe(
    blur_probability=0.0,
    solarize_probability=0.0,
    crop_area=(1.0, 1.0),
    crop_aspect=(1.0, 1.0),
    jitter_probability=0.0,
    gray_probability=0.0,
    flip_probability=0.0,
)


def build(channels: int, size: int = 32, seed: int = 0, **changes: Any) -> Callable[[np.ndarray], np.ndarray]:
    """A function from an image (H, W, C) to a view (S, S, C) to which only the given operations are applied."""
    views = BlockViews(size, rows=1, cols=1, branches=[replace(OFF, **changes)], channels=channels)
    generator = np.random.default_rng(seed)
    return lambda image: views.arrays(image, generator)["views"][0, 0].transpose(1, 2, 0)


def noise(channels: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(channels).integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize("channels", range(1, 14))
def test_views_have_the_channels_of_the_image(channels: int) -> None:
    views = BlockViews(size=16, channels=channels)
    image = noise(channels, 40, 50)
    drawn = views(image, np.random.default_rng(0))
    assert drawn.shape == (2, 4, channels, 16, 16)
    assert drawn.dtype == torch.uint8
    assert torch.equal(drawn, views(image, np.random.default_rng(0)))


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 13])
@pytest.mark.parametrize(
    "changes",
    [
        {"crop_area": (0.3, 0.5)},
        {"blur_probability": 1.0, "blur_sigma": (7.0, 14.0)},  # 1–2 pixels of a view of 32
        {"solarize_probability": 1.0},
        {"flip_probability": 1.0},
        {"jitter_probability": 1.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("side", [32, 100])
def test_a_step_does_the_same_to_every_channel(channels: int, changes: dict[str, Any], side: int) -> None:
    layer = noise(1, side, side)
    one = build(1, **changes)(layer)
    many = build(channels, **changes)(np.repeat(layer, channels, axis=2))
    assert not np.array_equal(one, layer)
    assert np.array_equal(many, np.repeat(one, channels, axis=2))


def test_shapes_and_positions_are_those_of_an_rgb_image() -> None:
    layer = noise(1, 60, 80)
    geometry = {"crop_area": (0.2, 0.6), "flip_probability": 0.5}
    gray, colour = (build(channels, **geometry) for channels in (1, 3))
    for _ in range(5):
        one, three = gray(layer), colour(np.repeat(layer, 3, axis=2))
        assert np.array_equal(np.repeat(one, 3, axis=2), three)


def test_gray_saturation_and_hue_are_skipped_without_colours() -> None:
    image = noise(4)
    unchanged = {"jitter_probability": 1.0, "brightness": 0.0, "contrast": 0.0, "gray_probability": 1.0}
    assert np.array_equal(build(4, **unchanged)(image), image)


@pytest.mark.parametrize(
    ("changes", "least", "most"),
    [
        ({"brightness": 0.4, "contrast": 0.0}, 0.6, 1.4),
        ({"brightness": 0.0, "contrast": 0.4}, 0.6, 1.4),
    ],
)
def test_brightness_and_contrast_have_the_recipes_range(changes: dict[str, float], least: float, most: float) -> None:
    values = np.linspace(60, 140, 32 * 32).reshape(32, 32, 1)
    image = np.dstack([values, values + 20, values - 20, values, values]).astype(np.uint8)
    pipeline = build(5, jitter_probability=1.0, **changes)
    ratios = []
    for _ in range(300):
        after = pipeline(image).astype(float)
        about = image.mean((0, 1)) if changes["contrast"] else 0.0
        mean_stays = np.allclose(after.mean((0, 1)), image.mean((0, 1)), atol=0.6)
        assert mean_stays or changes["brightness"]
        ratios.append(np.abs(after - about).mean() / np.abs(image - about).mean())
    assert least - 0.01 < min(ratios) < least + 0.05
    assert most - 0.05 < max(ratios) < most + 0.01


def test_channels_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got channels=0, expected at least 1: pass channels=3 for RGB"):
        BlockViews(size=32, channels=0)


@pytest.mark.parametrize("shape", [(20, 20, 3), (20, 20), (13, 20, 20), (0, 20, 13)])
def test_an_image_of_other_channels_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"got an image of shape .*, expected \(H, W, 13\) .*BlockViews\(channels=…\)"):
        BlockViews(size=32, channels=13)(np.zeros(shape, np.uint8))


def test_deeper_pixels_are_refused() -> None:
    with pytest.raises(TypeError, match=r"dtype uint16, expected a uint8 array \(H, W, 13\): pass pixels scaled"):
        BlockViews(size=32, channels=13)(np.zeros((20, 20, 13), np.uint16))
