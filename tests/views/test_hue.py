"""Hue rotation, against torchvision's operator on unrounded pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import adjust_hue

from mlssl.views.hue import HueTurner

S = 48
TURNS = [-0.5, -1 / 3, -0.3, -1 / 6, -0.1, -0.004, 0.0, 0.004, 0.05, 0.1, 1 / 6, 0.2, 1 / 3, 0.4, 0.5]


def colours(seed: int = 0) -> np.ndarray:
    """Random colours, and all that consist of the smallest, a middle and the largest value."""
    image = np.random.default_rng(seed).integers(0, 256, (S * S, 3), dtype=np.uint8)
    corners = np.stack(np.meshgrid(*[[0, 1, 127, 254, 255]] * 3), -1).reshape(-1, 3)
    image[: len(corners)] = corners
    return image.reshape(S, S, 3)


def turned(image: np.ndarray, turns: float) -> np.ndarray:
    return HueTurner(S)(image, turns, np.empty_like(image))


@pytest.mark.parametrize("turns", TURNS)
def test_equals_the_rotation_in_hsv_rounded_once(turns: float) -> None:
    exact = adjust_hue(torch.from_numpy(colours()).permute(2, 0, 1).double() / 255, turns).permute(1, 2, 0)
    np.testing.assert_allclose(turned(colours(), turns), 255 * exact.numpy(), atol=0.501)


@pytest.mark.parametrize("turns", [-1.0, 0.0, 1.0])
def test_a_full_rotation_changes_nothing(turns: float) -> None:
    np.testing.assert_array_equal(turned(colours(), turns), colours())


@pytest.mark.parametrize(
    ("turns", "to"), [(1 / 6, (255, 255, 0)), (1 / 3, (0, 255, 0)), (0.5, (0, 255, 255)), (-1 / 3, (0, 0, 255))]
)
def test_goes_from_red_by_yellow_to_green(turns: float, to: tuple[int, int, int]) -> None:
    red = np.full((S, S, 3), (255, 0, 0), np.uint8)
    np.testing.assert_array_equal(turned(red, turns), np.full((S, S, 3), to))


@pytest.mark.parametrize("turns", TURNS)
def test_gray_and_the_brightest_and_darkest_channel_stay(turns: float) -> None:
    gray = np.repeat(colours()[..., :1], 3, axis=-1)
    np.testing.assert_array_equal(turned(gray, turns), gray)
    ours = turned(colours(), turns)
    np.testing.assert_array_equal(ours.max(-1), colours().max(-1))
    np.testing.assert_array_equal(ours.min(-1), colours().min(-1))


def test_an_image_can_be_rotated_in_place_and_is_not_changed_otherwise() -> None:
    image, turn = colours(), HueTurner(S)
    out = np.empty_like(image)
    assert turn(image, 0.1, out) is out
    np.testing.assert_array_equal(image, colours())
    turn(image, 0.1, image)
    np.testing.assert_array_equal(image, out)
