"""Each operation's pixels against torchvision's, and whole views against two other implementations."""

from __future__ import annotations

import random
import sys
from itertools import permutations, product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms as T
from torchvision.transforms import functional as F

from mlssl.views.blocks import BlockViews
from mlssl.views.draws import NUM_UNIFORMS, Operations, draw_operations
from mlssl.views.grid import block_grid
from mlssl.views.pixels import Renderer
from mlssl.views.recipe import PRESETS

S = 64
WHOLE = {"top": 0, "left": 0, "height": S, "width": S}


def scene(height: int = S, width: int = S, seed: int = 0) -> np.ndarray:
    """Coloured noise with structure of a few pixels, from black to white, like a photograph's."""
    noise = np.random.default_rng(seed).normal(128, 400, (height, width, 3)).astype(np.float32)
    return cv2.GaussianBlur(noise, (0, 0), 2).clip(0, 255).astype(np.uint8)


def rendered(image: np.ndarray, **operations: Any) -> np.ndarray:
    """A view (S, S, C)."""
    out = np.empty((image.shape[2], S, S), np.uint8)
    Renderer(S, image.shape[2])(image, Operations(**{**WHOLE, **operations}), out)
    return out.transpose(1, 2, 0).astype(float)


def adjusted(image: np.ndarray, *jitters: tuple[str, float]) -> np.ndarray:
    """torchvision's own operators on a PIL image, one after another."""
    pil = Image.fromarray(image)
    for name, factor in jitters:
        pil = getattr(F, f"adjust_{name}")(pil, factor)
    return np.asarray(pil).astype(float)


def test_no_operation_leaves_the_pixels_unchanged() -> None:
    np.testing.assert_array_equal(rendered(scene()), scene())


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.6, 0.83, 1.0, 1.17, 1.4])
def test_brightness_contrast_and_saturation_are_torchvisions(name: str, factor: float) -> None:
    # torchvision's operators on PIL images cut fractions off where ours round.
    np.testing.assert_allclose(
        rendered(scene(), jitters=((name, factor),)), adjusted(scene(), (name, factor)), atol=1.6
    )


def exact(image: np.ndarray, *jitters: tuple[str, float]) -> np.ndarray:
    """torchvision's operators on floating-point pixels, which they do not round."""
    pixels = torch.from_numpy(image).permute(2, 0, 1).double() / 255
    for name, factor in jitters:
        pixels = getattr(F, f"adjust_{name}")(pixels, factor)
    return 255 * pixels.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("turns", [-0.1, -0.03, 0.0, 0.05, 0.1])
def test_hue_is_torchvisions(turns: float) -> None:
    jitter = ("hue", turns)
    ours, theirs = rendered(scene(), jitters=(jitter,)), adjusted(scene(), jitter)
    errors = [np.abs(one - exact(scene(), jitter)) for one in (ours, theirs)]
    assert errors[0].mean() <= errors[1].mean()
    assert errors[0].max() <= 0.501


@pytest.mark.parametrize("order", list(permutations(("brightness", "contrast", "saturation", "hue"))), ids="-".join)
def test_jitters_in_any_order_are_torchvisions_one_after_another(order: tuple[str, ...]) -> None:
    """Nearer to operators without rounding than torchvision's own on 8-bit images are."""
    generator = random.Random(repr(order))
    errors = []
    for seed in range(4):
        factors = [generator.uniform(-0.1, 0.1) if name == "hue" else generator.uniform(0.6, 1.4) for name in order]
        jitters = tuple(zip(order, factors, strict=True))
        both = rendered(scene(seed=seed), jitters=jitters), adjusted(scene(seed=seed), *jitters)
        errors.append([one - exact(scene(seed=seed), *jitters) for one in both])
    ours, theirs = np.array(errors).swapaxes(0, 1)
    assert np.abs(ours).mean() < np.abs(theirs).mean()
    assert abs(ours.mean()) < 0.3


def test_gray_is_torchvisions() -> None:
    theirs = np.asarray(F.to_grayscale(Image.fromarray(scene()), 3)).astype(float)
    np.testing.assert_allclose(rendered(scene(), gray=True), theirs, atol=1)


@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("gray", [False, True])
def test_blur_is_torchvisions(sigma: float, gray: bool) -> None:
    image = torch.from_numpy(rendered(scene(), gray=gray)).permute(2, 0, 1)
    theirs = F.gaussian_blur(image, [31, 31], [sigma, sigma]).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(rendered(scene(), gray=gray, blur_sigma=sigma), theirs, atol=1.01)


@pytest.mark.parametrize("sigma", [0.2, 0.3, 0.4, 0.5])
@pytest.mark.parametrize("gray", [False, True])
def test_blur_of_less_than_a_pixel_is_pillows(sigma: float, gray: bool) -> None:
    """On noise, which it changes by 5 to 18 levels; Pillow rounds it six times, which alone is one level."""
    noise = np.random.default_rng(0).integers(0, 256, scene().shape, np.uint8)
    plain = Image.fromarray(rendered(noise, gray=gray).astype(np.uint8))
    theirs = np.asarray(plain.filter(ImageFilter.GaussianBlur(sigma))).astype(float)
    ours = rendered(noise, gray=gray, blur_sigma=sigma)
    assert np.abs(ours - theirs).mean() < 0.1 * np.abs(theirs - np.asarray(plain)).mean() + 1.1


@pytest.mark.parametrize("threshold", [1, 100, 128, 255])
@pytest.mark.parametrize("gray", [False, True])
def test_solarize_is_pillows(threshold: int, gray: bool) -> None:
    plain = Image.fromarray(rendered(scene(), gray=gray).astype(np.uint8))
    theirs = np.asarray(ImageOps.solarize(plain, threshold))
    np.testing.assert_array_equal(rendered(scene(), gray=gray, solarize_from=threshold), theirs)


@pytest.mark.parametrize("gray", [False, True])
def test_flips_and_turns_are_numpys(gray: bool) -> None:
    plain = rendered(scene(), gray=gray, blur_sigma=1.0)
    for flip, vertical_flip, turns in product((False, True), (False, True), range(4)):
        moved = rendered(scene(), gray=gray, blur_sigma=1.0, flip=flip, vertical_flip=vertical_flip, turns=turns)
        expected = plain[:, ::-1] if flip else plain
        expected = expected[::-1] if vertical_flip else expected
        np.testing.assert_array_equal(moved, np.rot90(expected, -turns))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_noise_is_gaussian_independent_and_seeded(channels: int) -> None:
    flat = np.full((S, S, channels), 128, np.uint8)
    noise = rendered(flat, noise_std=0.08, noise_seed=1) - 128
    assert noise.std() == pytest.approx(0.08 * 255, rel=0.05)
    assert abs(noise.mean()) < 5 * 0.08 * 255 / noise.size**0.5
    assert np.mean(np.abs(noise) < 0.08 * 255) == pytest.approx(0.683, abs=0.04)
    pairs = [(noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise[..., 1:], noise[..., :-1])]
    for one, other in pairs[: 2 + (channels > 1)]:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / one.size**0.5
    np.testing.assert_array_equal(noise, rendered(flat, noise_std=0.08, noise_seed=1) - 128)
    assert not np.array_equal(noise, rendered(flat, noise_std=0.08, noise_seed=2) - 128)


def test_noise_is_clipped_at_black_and_white() -> None:
    for value in (0, 255):
        noisy = rendered(np.full((S, S, 3), value, np.uint8), noise_std=0.5)
        assert 0.4 < np.mean(noisy == value) < 0.6


@pytest.mark.parametrize("gray", [False, True])
def test_erasing_fills_only_its_rectangle_with_uniform_values(gray: bool) -> None:
    box = (10, 20, 30, 25)
    plain, erased = rendered(scene(), gray=gray), rendered(scene(), gray=gray, erased=box, erase_seed=3)
    inside = np.zeros((S, S), bool)
    inside[10:40, 20:45] = True
    np.testing.assert_array_equal(erased[~inside], plain[~inside])
    values = erased[inside][:, 0]
    assert values.mean() == pytest.approx(127.5, abs=5 * 74 / len(values) ** 0.5)
    assert values.std() == pytest.approx(256 / 12**0.5, rel=0.1)
    np.testing.assert_array_equal(erased, rendered(scene(), gray=gray, erased=box, erase_seed=3))
    assert not np.array_equal(erased, rendered(scene(), gray=gray, erased=box, erase_seed=4))


def test_flip_is_torchvisions_and_comes_last() -> None:
    operations: dict[str, Any] = {"gray": True, "blur_sigma": 1.0, "solarize_from": 128}
    np.testing.assert_array_equal(rendered(scene(), **operations, flip=True), rendered(scene(), **operations)[:, ::-1])
    np.testing.assert_array_equal(rendered(scene(), flip=True), scene()[:, ::-1])


@pytest.mark.parametrize("box", [(3, 5, 100, 120), (0, 0, 40, 50), (10, 0, 64, 128), (0, 0, 64, 64), (0, 0, 140, 50)])
def test_crop_is_resized_as_pillow_does(box: tuple[int, int, int, int]) -> None:
    image = scene(140, 160)
    top, left, height, width = box
    ours = rendered(image, top=top, left=left, height=height, width=width)
    crop = Image.fromarray(image[top : top + height, left : left + width])
    theirs = np.asarray(crop.resize((S, S), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(ours.astype(int), theirs, atol=1)


def test_views_are_not_sharper_than_pillows_and_torchvisions() -> None:
    """Of a photograph's fine texture, which interpolation without an average would leave in."""
    image = np.random.default_rng(0).integers(0, 256, (120, 96, 3), dtype=np.uint8)
    crop = T.RandomResizedCrop(S, PRESETS["paper"][0].crop_area, PRESETS["paper"][0].crop_aspect)
    torch.manual_seed(0)
    theirs = [np.asarray(crop(Image.fromarray(image))) for _ in range(200)]
    uniforms = np.random.default_rng(0).random((200, NUM_UNIFORMS))
    drawn = [draw_operations(PRESETS["paper"][0], 120, 96, S, row) for row in uniforms]
    ours = [rendered(image, **dict(zip(WHOLE, operations[:4], strict=True))) for operations in drawn]
    means = [np.mean([np.abs(np.diff(view.astype(int), axis=1)).mean() for view in views]) for views in (ours, theirs)]
    assert means[0] == pytest.approx(means[1], rel=0.05)


def test_downscaling_a_crop_uses_all_pixels() -> None:
    image = np.zeros((5 * S, 5 * S, 3), np.uint8)
    for row, column in np.random.default_rng(0).integers(5, 5 * S - 5, (20, 2)):
        image[:] = 0
        image[row, column] = 255
        assert rendered(image, height=5 * S, width=5 * S).sum() >= 3 * 8


def test_a_block_of_the_size_of_a_view_is_not_resized() -> None:
    image = scene()
    before = image.copy()
    rendered(image, jitters=(("hue", 0.1),), solarize_from=100)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 13])
def test_channels_are_processed_independently(channels: int) -> None:
    layer = scene(100, 90)[:, :, :1]
    operations: dict[str, Any] = {
        "top": 3, "left": 5, "height": 80, "width": 70, "blur_sigma": 1.2, "solarize_from": 99, "flip": True,
        "jitters": (("contrast", 1.3), ("hue", 0.1), ("brightness", 0.7), ("saturation", 1.2)), "gray": True,
    }  # fmt: skip
    one, many = (rendered(np.repeat(layer, number, axis=2), **operations) for number in (1, channels))
    np.testing.assert_array_equal(many, np.repeat(one, channels, axis=2))


@pytest.mark.parametrize("channels", [1, 5])
def test_brightness_and_contrast_of_other_channels(channels: int) -> None:
    image = np.dstack([scene(), scene(seed=1)])[:, :, :channels]
    bright = rendered(image, jitters=(("brightness", 1.3),))
    np.testing.assert_allclose(bright, (image * 1.3).clip(0, 255), atol=0.51)
    flat = rendered(image, jitters=(("contrast", 0.6),))
    means = image.mean((0, 1))
    np.testing.assert_allclose(flat, means + 0.6 * (image - means), atol=0.51)


def looks(views: list[np.ndarray]) -> np.ndarray:
    """Of each view (S, S, 3): mean and spread of each channel, mean saturation, mean step between neighbours."""
    table = []
    for view in views:
        pixels = view.astype(float)
        colour = (pixels.max(axis=2) - pixels.min(axis=2)).mean()
        steps = np.abs(np.diff(pixels, axis=1)).mean()
        table.append([*pixels.mean((0, 1)), *pixels.std((0, 1)), colour, steps])
    return np.array(table)


@pytest.mark.slow
@pytest.mark.parametrize("branch", [0, 1])
@pytest.mark.parametrize("other", ["albumentations", "torchvision"])
def test_views_look_like_those_of_other_libraries(branch: int, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means and spreads over many views of one image, by one recipe in three libraries."""
    num, image = 1200, scene(90, 120, seed=3)
    block = block_grid(*image.shape[:2])[0]
    cut = image[: block.height, : block.width]
    single = BlockViews(S, rows=1, cols=1)
    ours = [single(cut, np.random.default_rng(seed))[branch, 0].permute(1, 2, 0).numpy() for seed in range(num)]
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
    if other == "albumentations":
        monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
        import albumentations_way

        sys.modules.pop("albumentations_way")
        pipeline = albumentations_way.pipeline(PRESETS["paper"][branch], S)
        pipeline.set_random_state(np.random.default_rng(1), random.Random(1))
        theirs = [pipeline(image=cut)["image"] for _ in range(num)]
    else:
        import authors_way

        sys.modules.pop("authors_way")
        torch.manual_seed(1)
        random.seed(1)
        whole = authors_way.pil_pipeline(PRESETS["paper"][branch], S)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (authors_way.MEAN, authors_way.STD))
        views = [(whole(Image.fromarray(cut)) * std + mean) * 255 for _ in range(num)]
        theirs = [view.permute(1, 2, 0).numpy() for view in views]
    one, two = looks(ours), looks(theirs)
    spread = two.std(axis=0)
    error = 4.5 * spread * (2 / num) ** 0.5
    # Pillow's filters differ slightly when resizing, by at most 1 of 255.
    np.testing.assert_array_less(np.abs(one.mean(axis=0) - two.mean(axis=0)), error + 1)
    np.testing.assert_array_less(np.abs(one.std(axis=0) - spread), error + 1)
