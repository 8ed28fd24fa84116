"""A recipe's numbers and presets, and each operation of BlockViews against the method's table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlssl.views.blocks import BlockViews
from mlssl.views.recipe import PRESETS, Recipe

OFF = Recipe(
    blur_probability=0.0,
    solarize_probability=0.0,
    crop_area=(1.0, 1.0),
    crop_aspect=(1.0, 1.0),
    jitter_probability=0.0,
    gray_probability=0.0,
    flip_probability=0.0,
)
NO_JITTER = {"jitter_probability": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}


def build(size: int = 32, seed: int = 0, **changes: Any) -> Callable[[np.ndarray], np.ndarray]:
    """A function from an image (H, W, 3) to a view (S, S, 3) to which only the given operations are applied."""
    views = BlockViews(size, rows=1, cols=1, branches=[replace(OFF, **changes)])
    generator = np.random.default_rng(seed)
    return lambda image: views.arrays(image, generator)["views"][0, 0].transpose(1, 2, 0)


def noise(height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def flat(red: int, green: int, blue: int, side: int = 32) -> np.ndarray:
    return np.full((side, side, 3), (red, green, blue), np.uint8)


def share(pipeline: Callable[[np.ndarray], np.ndarray], image: np.ndarray, calls: int = 600) -> float:
    """Share of the calls that change the image."""
    return float(np.mean([not np.array_equal(pipeline(image), image) for _ in range(calls)]))


def test_branches_have_the_methods_probabilities() -> None:
    first, second = PRESETS["paper"]
    assert first == Recipe()
    assert (first.blur_probability, first.solarize_probability) == (0.5, 0.5)
    assert (second.blur_probability, second.solarize_probability) == (0.1, 0.2)
    assert replace(first, blur_probability=0.1, solarize_probability=0.2) == second


def test_a_disabled_recipe_leaves_the_pixels_unchanged() -> None:
    image = noise()
    np.testing.assert_array_equal(build()(image), image)


@pytest.mark.parametrize(
    ("changes", "probability"),
    [
        ({"jitter_probability": 0.8, "brightness": 0.4}, 0.8),
        ({"gray_probability": 0.2}, 0.2),
        ({"blur_probability": 0.5, "blur_sigma": (7.0, 14.0)}, 0.5),
        ({"blur_probability": 0.1, "blur_sigma": (7.0, 14.0)}, 0.1),
        ({"solarize_probability": 0.2}, 0.2),
        ({"flip_probability": 0.5}, 0.5),
    ],
)
def test_operations_act_with_their_probability(changes: dict[str, Any], probability: float) -> None:
    four_standard_errors = 4 * (probability * (1 - probability) / 600) ** 0.5
    assert abs(share(build(**changes), noise()) - probability) < four_standard_errors


@pytest.mark.parametrize("source", [(20, 24), (40, 48), (64, 60), (160, 160)])
def test_crop_is_resized_as_pillow_does(source: tuple[int, int]) -> None:
    height, width = source
    image = noise(height, width)
    crop_aspect = (width / height, width / height)
    view = build(crop_aspect=crop_aspect)(image)
    theirs = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(view.astype(int), theirs, atol=1)


def test_crop_does_not_change_the_image_and_copies_its_pixels() -> None:
    image = noise()
    view = build()(image)
    assert not np.shares_memory(view, image)


def test_brightness_multiplies_by_a_factor_uniform_in_its_range() -> None:
    pipeline = build(**{**NO_JITTER, "brightness": 0.4})
    factors = [pipeline(flat(100, 100, 100)).mean() / 100 for _ in range(800)]
    assert 0.59 <= min(factors) < 0.62
    assert 1.38 < max(factors) <= 1.4
    assert np.mean(factors) == pytest.approx(1.0, abs=0.04)
    assert np.std(factors) == pytest.approx(0.8 / 12**0.5, abs=0.02)


def test_contrast_scales_about_the_mean_of_gray() -> None:
    image = np.concatenate([flat(100, 100, 100)[:16], flat(140, 140, 140)[:16]])
    pipeline = build(**{**NO_JITTER, "contrast": 0.4})
    views = [pipeline(image).astype(float) for _ in range(800)]
    factors = [(view[-1].mean() - view[0].mean()) / 40 for view in views]
    assert 0.57 <= min(factors) < 0.64
    assert 1.36 < max(factors) <= 1.43
    assert np.mean(factors) == pytest.approx(1.0, abs=0.04)
    assert np.std(factors) == pytest.approx(0.8 / 12**0.5, abs=0.02)
    assert max(abs(view.mean() - 120) for view in views) <= 1


def test_saturation_moves_between_gray_and_colour() -> None:
    image = flat(140, 100, 120)
    gray = 0.299 * 140 + 0.587 * 100 + 0.114 * 120
    pipeline = build(**{**NO_JITTER, "saturation": 0.4})
    factors = []
    for _ in range(800):
        view = pipeline(image)[0, 0].astype(float)
        factors.append((view[0] - view[1]) / 40)
        np.testing.assert_allclose(view, gray + factors[-1] * (np.array([140, 100, 120]) - gray), atol=1.5)
    assert np.mean(factors) == pytest.approx(1.0, abs=0.04)
    assert np.std(factors) == pytest.approx(0.8 / 12**0.5, abs=0.02)


def test_hue_rotates_by_at_most_a_tenth_of_the_colour_circle() -> None:
    pipeline = build(**{**NO_JITTER, "hue": 0.1})
    turns = []
    for _ in range(800):
        view = pipeline(flat(40, 200, 40))[:1, :1]
        hue = int(np.asarray(Image.fromarray(view).convert("HSV"))[0, 0, 0]) / 255
        turns.append(hue - 1 / 3)
    step = 1 / 180
    assert -0.1 - 2 * step <= min(turns) < -0.09
    assert 0.085 < max(turns) <= 0.1 + 2 * step
    assert np.mean(turns) == pytest.approx(0.0, abs=0.01)
    assert np.std(turns) == pytest.approx(0.2 / 12**0.5, abs=0.006)


def test_gray_is_the_luma_in_three_channels() -> None:
    image = noise()
    view = build(gray_probability=1.0)(image)
    assert view.shape == (32, 32, 3)
    np.testing.assert_allclose(view, (image @ [0.299, 0.587, 0.114])[..., None].repeat(3, axis=2), atol=1)


@pytest.mark.parametrize(("size", "sigma"), [(224, 2.0), (112, 2.0), (64, 3.0), (448, 1.0)])
def test_blur_is_a_gaussian_whose_sigma_scales_with_the_view(size: int, sigma: float) -> None:
    expected = sigma * size / 224
    point = np.zeros((size, size, 3), np.uint8)
    point[size // 2, :] = 255
    view = build(size, blur_probability=1.0, blur_sigma=(sigma, sigma))(point)[:, 0, 0].astype(float)
    offsets = np.arange(size) - size // 2
    gaussian = np.exp(-0.5 * (offsets / expected) ** 2)
    np.testing.assert_allclose(view, 255 * gaussian / gaussian.sum(), atol=1)


@pytest.mark.parametrize("sigma", [0.7, 1.0, 1.5, 2.0])
def test_a_small_view_is_blurred_as_much_for_its_size(sigma: float) -> None:
    point = np.zeros((64, 64, 3), np.uint8)
    point[32, :] = 255
    view = build(64, blur_probability=1.0, blur_sigma=(sigma, sigma))(point)[:, 0, 0] / 255
    assert view @ (np.arange(64) - 32) ** 2 == pytest.approx((sigma * 64 / 224) ** 2, abs=0.01)


@pytest.mark.parametrize("threshold", [1, 100, 128, 255])
def test_solarize_inverts_from_the_threshold_up(threshold: int) -> None:
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    view = build(16, solarize_probability=1.0, solarize_threshold=threshold)(image)
    np.testing.assert_array_equal(view, np.where(image >= threshold, 255 - image, image))


def test_default_solarize_threshold_is_128() -> None:
    view = build(solarize_probability=1.0)(flat(127, 128, 255))
    np.testing.assert_array_equal(view, flat(127, 127, 0))


def test_flip_mirrors_left_and_right() -> None:
    image = noise()
    np.testing.assert_array_equal(build(flip_probability=1.0)(image), image[:, ::-1])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"hue": 0.6}, "got hue=0.6, expected a number from 0 to 0.5"),
        ({"blur_probability": -0.1}, "got blur_probability=-0.1, expected a number from 0 to 1"),
        ({"contrast": float("nan")}, "got contrast=nan, expected a number from 0 to 1"),
        ({"solarize_threshold": 0}, "got solarize_threshold=0, expected a number from 1 to 255"),
        ({"crop_area": (1.0, 0.2)}, "expected two numbers, the smaller first, each from 0.001 to 1"),
        ({"blur_sigma": [-1.0, 2.0]}, r"got blur_sigma=\[-1.0, 2.0\], expected two numbers"),
    ],
)
def test_invalid_recipe_numbers_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(OFF, **wrong)
