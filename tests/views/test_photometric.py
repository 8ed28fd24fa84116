"""Each operation of the recipes against the method's table."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlssl.views.photometric import BRANCH_RECIPES, Recipe, branch_recipe

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


def build(size: int = 32, seed: int = 0, **changes: Any) -> Any:
    """A pipeline in which only the given operations act."""
    pipeline = branch_recipe(0, size, [replace(OFF, **changes)])
    pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
    return pipeline


def noise(height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def flat(red: int, green: int, blue: int, side: int = 32) -> np.ndarray:
    return np.full((side, side, 3), (red, green, blue), np.uint8)


def share(pipeline: Any, image: np.ndarray, calls: int = 600) -> float:
    """Share of the calls that change the image."""
    return float(np.mean([not np.array_equal(pipeline(image=image)["image"], image) for _ in range(calls)]))


def test_branches_hold_the_methods_probabilities() -> None:
    first, second = BRANCH_RECIPES
    assert (first.blur_probability, first.solarize_probability) == (0.5, 0.5)
    assert (second.blur_probability, second.solarize_probability) == (0.1, 0.2)
    assert replace(first, blur_probability=0.1, solarize_probability=0.2) == second


def test_default_pipelines_carry_the_recipe_in_order() -> None:
    for branch, recipe in enumerate(BRANCH_RECIPES):
        crop, jitter, gray, blur, solarize, flip = branch_recipe(branch)
        names = [type(step).__name__ for step in (crop, jitter, gray, blur, solarize, flip)]
        assert names == ["RandomResizedCrop", "ColorJitter", "ToGray", "GaussianBlur", "Solarize", "HorizontalFlip"]
        assert (crop.p, crop.size, crop.scale, crop.ratio) == (1.0, (224, 224), (0.2, 1.0), (3 / 4, 4 / 3))
        assert (jitter.p, jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (
            0.8,
            (0.6, 1.4),
            (0.6, 1.4),
            (0.6, 1.4),
            (-0.1, 0.1),
        )
        assert (gray.p, flip.p) == (0.2, 0.5)
        assert (blur.p, blur.sigma_limit) == (recipe.blur_probability, (0.1, 2.0))
        assert solarize.p == recipe.solarize_probability


def test_all_off_leaves_the_pixels() -> None:
    image = noise()
    np.testing.assert_array_equal(build()(image=image)["image"], image)


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


def test_crop_area_is_uniform_and_aspect_log_uniform() -> None:
    crop = build(crop_area=(0.2, 1.0), crop_aspect=(3 / 4, 4 / 3))[0]
    side = 1000
    areas, aspects, centres = [], [], []
    for _ in range(3000):
        left, top, right, bottom = crop.get_params_dependent_on_data({"shape": (side, side, 3)}, {})["crop_coords"]
        assert 0 <= left < right <= side
        assert 0 <= top < bottom <= side
        areas.append((right - left) * (bottom - top) / side**2)
        aspects.append(np.log((right - left) / (bottom - top)))
        centres.append(((left + right) / 2 / side, (top + bottom) / 2 / side))
    assert min(areas) >= 0.199
    assert max(areas) <= 1.0
    # Below 3/4 every aspect fits, so no draw is refused there and the area is uniform.
    below = [area for area in areas if area < 0.75]
    assert np.mean(below) == pytest.approx((0.2 + 0.75) / 2, abs=0.015)
    assert np.std(below) == pytest.approx((0.75 - 0.2) / 12**0.5, abs=0.015)
    below_aspects = [aspect for aspect, area in zip(aspects, areas, strict=True) if area < 0.75]
    assert np.mean(below_aspects) == pytest.approx(0.0, abs=0.015)
    assert np.std(below_aspects) == pytest.approx(2 * np.log(4 / 3) / 12**0.5, abs=0.01)
    np.testing.assert_allclose(np.mean(centres, axis=0), 0.5, atol=0.01)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (40, 1), (20, 4000), (4000, 20)])
def test_crop_keeps_its_aspect_in_any_shape(height: int, width: int) -> None:
    pipeline = branch_recipe(0, 16)
    pipeline.set_random_state(np.random.default_rng(0), random.Random(0))
    crop = pipeline[0]
    for _ in range(50):
        left, top, right, bottom = crop.get_params_dependent_on_data({"shape": (height, width, 3)}, {})["crop_coords"]
        assert right - left <= max(1, 4 / 3 * (bottom - top) + 1)
        assert bottom - top <= max(1, 4 / 3 * (right - left) + 1)
    assert pipeline(image=noise(height, width))["image"].shape == (16, 16, 3)


@pytest.mark.parametrize("source", [(20, 24), (40, 48), (64, 60), (160, 160)])
def test_crop_is_resized_as_pillow_does(source: tuple[int, int]) -> None:
    height, width = source
    image = noise(height, width)
    crop_aspect = (width / height, width / height)
    view = build(crop_aspect=crop_aspect)(image=image)["image"]
    theirs = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(view.astype(int), theirs, atol=1)


def test_crop_leaves_the_image_and_owns_its_pixels() -> None:
    image = noise()
    view = build()(image=image)["image"]
    assert not np.shares_memory(view, image)


def test_brightness_multiplies_by_a_factor_uniform_in_its_range() -> None:
    pipeline = build(**{**NO_JITTER, "brightness": 0.4})
    factors = [pipeline(image=flat(100, 100, 100))["image"].mean() / 100 for _ in range(800)]
    assert 0.59 <= min(factors) < 0.62
    assert 1.38 < max(factors) <= 1.4
    assert np.mean(factors) == pytest.approx(1.0, abs=0.04)
    assert np.std(factors) == pytest.approx(0.8 / 12**0.5, abs=0.02)


def test_contrast_scales_about_the_mean_of_gray() -> None:
    image = np.concatenate([flat(100, 100, 100)[:16], flat(140, 140, 140)[:16]])
    pipeline = build(**{**NO_JITTER, "contrast": 0.4})
    views = [pipeline(image=image)["image"].astype(float) for _ in range(800)]
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
        view = pipeline(image=image)["image"][0, 0].astype(float)
        factors.append((view[0] - view[1]) / 40)
        np.testing.assert_allclose(view, gray + factors[-1] * (np.array([140, 100, 120]) - gray), atol=1.5)
    assert np.mean(factors) == pytest.approx(1.0, abs=0.04)
    assert np.std(factors) == pytest.approx(0.8 / 12**0.5, abs=0.02)


def test_hue_turns_the_colour_circle_by_at_most_a_tenth() -> None:
    pipeline = build(**{**NO_JITTER, "hue": 0.1})
    turns = []
    for _ in range(800):
        view = pipeline(image=flat(40, 200, 40))["image"][:1, :1]
        hue = int(np.asarray(Image.fromarray(view).convert("HSV"))[0, 0, 0]) / 255
        turns.append(hue - 1 / 3)
    step = 1 / 180
    assert -0.1 - 2 * step <= min(turns) < -0.09
    assert 0.085 < max(turns) <= 0.1 + 2 * step
    assert np.mean(turns) == pytest.approx(0.0, abs=0.01)
    assert np.std(turns) == pytest.approx(0.2 / 12**0.5, abs=0.006)


def test_jitter_takes_every_order() -> None:
    jitter = build(jitter_probability=1.0)[1]
    orders = [tuple(jitter.get_params()["order"]) for _ in range(1200)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 24
    assert max(counts) < 2 * 1200 / 24


def test_gray_is_the_luma_in_three_channels() -> None:
    image = noise()
    view = build(gray_probability=1.0)(image=image)["image"]
    assert view.shape == (32, 32, 3)
    np.testing.assert_allclose(view, (image @ [0.299, 0.587, 0.114])[..., None].repeat(3, axis=2), atol=1)


@pytest.mark.parametrize(("size", "sigma"), [(224, 2.0), (112, 2.0), (64, 3.0), (448, 1.0)])
def test_blur_is_a_gaussian_whose_sigma_scales_with_the_view(size: int, sigma: float) -> None:
    expected = sigma * size / 224
    point = np.zeros((size, size, 3), np.uint8)
    point[size // 2, :] = 255
    view = build(size, blur_probability=1.0, blur_sigma=(sigma, sigma))(image=point)["image"][:, 0, 0].astype(float)
    offsets = np.arange(size) - size // 2
    gaussian = np.exp(-0.5 * (offsets / expected) ** 2)
    np.testing.assert_allclose(view, 255 * gaussian / gaussian.sum(), atol=1)


@pytest.mark.parametrize("sigma", [0.7, 1.0, 1.5, 2.0])
def test_a_small_view_is_blurred_as_much_for_its_size(sigma: float) -> None:
    point = np.zeros((64, 64, 3), np.uint8)
    point[32, :] = 255
    view = build(64, blur_probability=1.0, blur_sigma=(sigma, sigma))(image=point)["image"][:, 0, 0] / 255
    assert view @ (np.arange(64) - 32) ** 2 == pytest.approx((sigma * 64 / 224) ** 2, abs=0.01)


def test_blur_sigma_is_uniform_in_its_range() -> None:
    blur = build(224, blur_probability=1.0, blur_sigma=(0.1, 2.0))[3]
    sigmas = []
    for _ in range(2000):
        kernel = blur.get_params_dependent_on_data({}, {})["kernel"]
        middle = len(kernel) // 2
        sigmas.append((kernel @ (np.arange(len(kernel)) - middle) ** 2) ** 0.5)
    assert max(sigmas) <= 2.0
    for sigma in (0.25, 0.5, 1.0, 1.5):
        assert np.mean(np.array(sigmas) < sigma) == pytest.approx((sigma - 0.1) / 1.9, abs=0.04)


@pytest.mark.parametrize("threshold", [1, 100, 128, 255])
def test_solarize_inverts_from_the_threshold_up(threshold: int) -> None:
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    view = build(16, solarize_probability=1.0, solarize_threshold=threshold)(image=image)["image"]
    np.testing.assert_array_equal(view, np.where(image >= threshold, 255 - image, image))


def test_default_solarize_threshold_is_128() -> None:
    view = build(solarize_probability=1.0)(image=flat(127, 128, 255))["image"]
    np.testing.assert_array_equal(view, flat(127, 127, 0))


def test_flip_mirrors_left_and_right() -> None:
    image = noise()
    np.testing.assert_array_equal(build(flip_probability=1.0)(image=image)["image"], image[:, ::-1])


@pytest.mark.parametrize("branch", [-1, 2])
def test_unknown_branch_is_refused(branch: int) -> None:
    with pytest.raises(ValueError, match=f"branch={branch}, expected one of the 2 recipes: pass branch=0 to 1"):
        branch_recipe(branch)


def test_small_view_is_refused_and_the_smallest_works() -> None:
    with pytest.raises(ValueError, match="size=15, expected views of at least 16 × 16 pixels: pass size=224"):
        branch_recipe(0, 15)
    assert branch_recipe(0, 16)(image=noise())["image"].shape == (16, 16, 3)


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_building_restores_the_environment(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if before is None:
        monkeypatch.delenv("NO_ALBUMENTATIONS_UPDATE", raising=False)
    else:
        monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", before)
    environment = dict(os.environ)
    branch_recipe(0, 32)
    assert dict(os.environ) == environment


def test_first_build_opens_no_connection_and_restores_the_environment() -> None:
    code = """
import os, socket, sys, warnings
import cv2  # its loader extends LD_LIBRARY_PATH
def refuse(*arguments, **named):
    raise AssertionError("a socket was opened")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from mlssl.views.photometric import branch_recipe
assert "albumentations" not in sys.modules
warnings.simplefilter("error")  # from here, for older releases of what is imported above warn
before = dict(os.environ)
branch_recipe(0, 32)
assert "albumentations" in sys.modules
assert dict(os.environ) == before
"""
    environment = {name: value for name, value in os.environ.items() if name != "NO_ALBUMENTATIONS_UPDATE"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
def test_numbers_that_no_recipe_can_have_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(OFF, **wrong)
