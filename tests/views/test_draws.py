"""Samples for a view: their distribution against torchvision's, over thousands of both."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torchvision import transforms as T

from mlssl.views.draws import CROP_UNIFORMS, NUM_UNIFORMS, Operations, draw_operations
from mlssl.views.recipe import PRESETS, Recipe
from mlssl.views.streams import RESERVED, Streams

NUM = 4000
SIZE = 224


def drawn(branch: int, height: int = 336, width: int = 448, size: int = SIZE) -> list[Operations]:
    uniforms = np.random.default_rng(0).random((NUM, NUM_UNIFORMS)).tolist()
    return [draw_operations(PRESETS["paper"][branch], height, width, size, numbers) for numbers in uniforms]


def assert_same_distribution(ours: list[float], theirs: list[float]) -> None:
    """Means and spreads agree within five standard errors, and Kolmogorov and Smirnov find no difference (p 0.0001)."""
    one, other = np.sort(ours), np.sort(theirs)
    share = (1 / len(one) + 1 / len(other)) ** 0.5
    assert one.mean() == pytest.approx(other.mean(), abs=5 * other.std() * share)
    assert one.std() == pytest.approx(other.std(), abs=5 * other.std() * share)
    values = np.concatenate([one, other])
    ranks = [np.searchsorted(each, values, side="right") / len(each) for each in (one, other)]
    assert np.abs(ranks[0] - ranks[1]).max() < 2.23 * share


@pytest.mark.parametrize(("height", "width"), [(336, 448), (100, 100), (40, 200)])
def test_crops_are_those_of_torchvision(height: int, width: int) -> None:
    ours = drawn(0, height, width)
    torch.manual_seed(0)
    block = torch.empty(3, height, width)
    theirs = [T.RandomResizedCrop.get_params(block, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(NUM)]
    for measure in (
        lambda top, left, h, w: h * w / (height * width),
        lambda top, left, h, w: np.log(w / h),
        lambda top, left, h, w: top + h / 2,
        lambda top, left, h, w: left + w / 2,
    ):
        assert_same_distribution([measure(*one[:4]) for one in ours], [measure(*one) for one in theirs])
    assert all(one.top + one.height <= height and one.left + one.width <= width for one in ours)


def test_jitters_are_those_of_torchvision() -> None:
    ours = [one.jitters for one in drawn(0) if one.jitters]
    torch.manual_seed(0)
    bounds = ([0.6, 1.4], [0.6, 1.4], [0.6, 1.4], [-0.1, 0.1])
    theirs = [T.ColorJitter.get_params(*bounds) for _ in range(NUM)]
    for place, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        assert_same_distribution([dict(one)[name] for one in ours], [one[1 + place] for one in theirs])
    orders = [tuple(name for name, _ in one) for one in ours]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 24
    assert max(abs(count - len(ours) / 24) for count in counts) < 5 * (len(ours) / 24) ** 0.5


@pytest.mark.parametrize("size", [224, 64])
def test_blur_is_that_of_torchvision_scaled_with_the_view(size: int) -> None:
    ours = [one.blur_sigma * 224 / size for one in drawn(0, size=size) if one.blur_sigma]
    torch.manual_seed(0)
    assert_same_distribution(ours, [T.GaussianBlur.get_params(0.1, 2.0) for _ in range(NUM)])


@pytest.mark.parametrize("branch", [0, 1])
def test_operations_have_the_frequencies_of_the_method(branch: int) -> None:
    views = drawn(branch)
    frequent = {
        "jitter": (np.mean([bool(one.jitters) for one in views]), 0.8),
        "gray": (np.mean([one.gray for one in views]), 0.2),
        "blur": (np.mean([one.blur_sigma > 0 for one in views]), (0.5, 0.1)[branch]),
        "solarize": (np.mean([one.solarize_from == 128 for one in views]), (0.5, 0.2)[branch]),
        "flip": (np.mean([one.flip for one in views]), 0.5),
    }
    for name, (share, probability) in frequent.items():
        assert share == pytest.approx(probability, abs=5 * (probability * (1 - probability) / NUM) ** 0.5), name


def test_samples_are_independent() -> None:
    views = drawn(0)
    table = np.array(
        [
            [
                one.height * one.width,
                np.log(one.width / one.height),
                bool(one.jitters),
                one.gray,
                one.blur_sigma > 0,
                one.solarize_from is not None,
                one.flip,
                (one.left + 0.5) / (449 - one.width),
                (one.top + 0.5) / (337 - one.height),
            ]
            for one in views
        ],
        dtype=float,
    )
    correlations = np.corrcoef(table.T) - np.eye(table.shape[1])
    correlations[0, 1] = correlations[1, 0] = 0  # a wide large crop does not fit
    assert np.abs(correlations).max() < 5 / NUM**0.5


FIRST_UNIFORMS = CROP_UNIFORMS + 11
"""Those of the operations that came first, up to the horizontal flip."""

ADDED = {"vertical_flip_probability": 1, "turn_probability": 1, "noise_probability": 1, "erase_probability": 1}


def first_operations(one: Operations) -> tuple[Any, ...]:
    return (*one[:4], one.jitters, one.gray, one.blur_sigma, one.solarize_from, one.flip)


def test_operations_that_came_first_do_not_depend_on_the_numbers_of_later_ones() -> None:
    uniforms = np.random.default_rng(0).random((100, NUM_UNIFORMS))
    other = uniforms.copy()
    other[:, FIRST_UNIFORMS:] = np.random.default_rng(1).random((100, NUM_UNIFORMS - FIRST_UNIFORMS))
    recipe = Recipe(**ADDED)
    for one, two in zip(uniforms.tolist(), other.tolist(), strict=True):
        both = [draw_operations(recipe, 90, 70, SIZE, numbers) for numbers in (one, two)]
        assert first_operations(both[0]) == first_operations(both[1])
        assert both[0] != both[1]


def test_the_first_numbers_of_a_stream_do_not_depend_on_how_many_follow() -> None:
    few, many = (Streams().uniforms(5, 1, 4, number) for number in (FIRST_UNIFORMS, RESERVED))
    assert few == [numbers[:FIRST_UNIFORMS] for numbers in many]
    assert NUM_UNIFORMS <= RESERVED


@pytest.mark.parametrize("added", list(ADDED))
def test_enabling_an_operation_does_not_change_others(added: str) -> None:
    field = {
        "vertical_flip_probability": "vertical_flip",
        "turn_probability": "turns",
        "noise_probability": "noise_std",
    }
    name = field.get(added, "erased")
    for numbers in np.random.default_rng(0).random((50, NUM_UNIFORMS)).tolist():
        without = draw_operations(Recipe(), 90, 70, SIZE, numbers)
        with_it = draw_operations(Recipe(**{added: 1}), 90, 70, SIZE, numbers)
        assert not getattr(without, name)
        assert getattr(with_it, name)
        assert with_it._replace(**{name: getattr(without, name)}) == without


def test_added_operations_have_the_requested_frequency_and_strength() -> None:
    asked = {
        "vertical_flip_probability": 0.3,
        "turn_probability": 0.6,
        "noise_probability": 0.2,
        "erase_probability": 0.7,
    }
    recipe = Recipe(**asked)
    uniforms = np.random.default_rng(0).random((NUM, NUM_UNIFORMS)).tolist()
    views = [draw_operations(recipe, 336, 448, SIZE, numbers) for numbers in uniforms]
    frequent = {
        "vertical_flip_probability": np.mean([one.vertical_flip for one in views]),
        "turn_probability": np.mean([one.turns > 0 for one in views]),
        "noise_probability": np.mean([one.noise_std > 0 for one in views]),
        "erase_probability": np.mean([one.erased is not None for one in views]),
    }
    for name, share in frequent.items():
        assert share == pytest.approx(asked[name], abs=5 * (asked[name] * (1 - asked[name]) / NUM) ** 0.5), name
    turns = [one.turns for one in views if one.turns]
    for turn in (1, 2, 3):
        assert turns.count(turn) / len(turns) == pytest.approx(1 / 3, abs=5 * (2 / 9 / len(turns)) ** 0.5)
    stds = [one.noise_std for one in views if one.noise_std]
    assert np.mean(stds) == pytest.approx(0.05, abs=5 * 0.1 / 12**0.5 / len(stds) ** 0.5)
    assert len({one.noise_seed for one in views} | {one.erase_seed for one in views}) == 2 * NUM


def test_erased_rectangles_are_those_of_torchvision() -> None:
    recipe = Recipe(erase_probability=1)
    uniforms = np.random.default_rng(0).random((NUM, NUM_UNIFORMS)).tolist()
    ours = [draw_operations(recipe, 336, 448, SIZE, numbers).erased for numbers in uniforms]
    torch.manual_seed(0)
    view = torch.empty(3, SIZE, SIZE)
    theirs = [T.RandomErasing.get_params(view, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(NUM)]
    for measure in (
        lambda top, left, h, w: h * w / SIZE**2,
        lambda top, left, h, w: abs(np.log(w / h)),  # torchvision's aspect is height / width
        lambda top, left, h, w: top + h / 2,
        lambda top, left, h, w: left + w / 2,
    ):
        assert_same_distribution([measure(*one) for one in ours if one], [measure(*one) for one in theirs])


def test_a_jitter_of_strength_0_is_left_out() -> None:
    recipe = Recipe(jitter_probability=1, saturation=0, hue=0)
    for numbers in np.random.default_rng(0).random((50, NUM_UNIFORMS)).tolist():
        jitters = draw_operations(recipe, 90, 70, SIZE, numbers).jitters
        assert sorted(name for name, _ in jitters) == ["brightness", "contrast"]


@pytest.mark.parametrize("number", [0.0, np.nextafter(1.0, 0.0)])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (40, 1), (20, 4000), (4000, 20), (7, 7)])
def test_crops_stay_in_the_block_at_the_limits_of_every_sample(height: int, width: int, number: float) -> None:
    one = draw_operations(PRESETS["paper"][0], height, width, SIZE, [number] * NUM_UNIFORMS)
    assert 0 <= one.top < one.top + one.height <= height
    assert 0 <= one.left < one.left + one.width <= width
    assert one.width <= max(1, 4 / 3 * one.height + 1)
    assert one.height <= max(1, 4 / 3 * one.width + 1)
