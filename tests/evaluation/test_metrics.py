"""Average precision: scikit-learn, a slow loop, ties, unknown targets, degenerate cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from mlssl.evaluation.metrics import average_precision, mean_average_precision


def slow_average_precision(scores: list[float], targets: list[int]) -> float:
    """Walk the thresholds from the highest down; every image at a threshold is retrieved at once."""
    pairs = [(score, target) for score, target in zip(scores, targets, strict=True) if target >= 0]
    positives = sum(target for _, target in pairs)
    if not positives:
        return math.nan
    total, recall = 0.0, 0.0
    for threshold in sorted({score for score, _ in pairs}, reverse=True):
        retrieved = [target for score, target in pairs if score >= threshold]
        total += (sum(retrieved) / positives - recall) * sum(retrieved) / len(retrieved)
        recall = sum(retrieved) / positives
    return total


@pytest.mark.parametrize("levels", [2, 5, 1000], ids=["many ties", "ties", "hardly any tie"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_scikit_learn_and_a_slow_loop(levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (40, 7), generator=generator) / levels - 0.5
    targets = torch.randint(-1, 2, (40, 7), generator=generator)
    targets[:, 3] = targets[:, 3].clamp(max=0)
    result = average_precision(scores, targets)
    for label in range(7):
        slow = slow_average_precision(scores[:, label].tolist(), targets[:, label].tolist())
        known = targets[:, label] >= 0
        assert result[label].item() == pytest.approx(slow, abs=1e-12, nan_ok=True)
        if label != 3:
            reference = average_precision_score(targets[known, label].numpy(), scores[known, label].numpy())
            assert result[label].item() == pytest.approx(reference, abs=1e-12)


def test_order_of_the_images_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 3, (30, 4), generator=generator).float()
    targets = torch.randint(-1, 2, (30, 4), generator=generator)
    order = torch.randperm(30, generator=generator)
    moved = average_precision(scores[order], targets[order])
    torch.testing.assert_close(moved, average_precision(scores, targets), rtol=1e-12, atol=0)  # another order of sums


def test_unknown_targets_are_ignored() -> None:
    generator = torch.Generator().manual_seed(1)
    scores, targets = torch.randn(20, 3, generator=generator), torch.randint(0, 2, (20, 3), generator=generator)
    extra = torch.tensor([[torch.inf], [-torch.inf], [0.0]]).expand(3, 3)
    with_unknown = average_precision(torch.cat([extra, scores]), torch.cat([torch.full((3, 3), -1), targets]))
    assert torch.equal(with_unknown, average_precision(scores, targets))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int64])
def test_takes_bool_and_any_integer(dtype: torch.dtype) -> None:
    targets = torch.tensor([1, 0, 1, 0]).to(dtype)
    assert average_precision(torch.tensor([4.0, 3.0, 2.0, 1.0]), targets).item() == pytest.approx((1 + 2 / 3) / 2)


def test_perfect_worst_and_constant_scores() -> None:
    targets = torch.tensor([1, 1, 0, 0, 0])
    best = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    assert average_precision(best, targets).item() == 1
    assert average_precision(-best, targets).item() == pytest.approx((1 / 4 + 2 / 5) / 2)
    assert average_precision(torch.zeros(5), targets).item() == pytest.approx(2 / 5), "one tie: the share of positives"


def test_infinite_scores_have_ranks() -> None:
    scores = torch.tensor([torch.inf, 1.0, -torch.inf])
    assert average_precision(scores, torch.tensor([1, 1, 0])).item() == 1


def test_scores_are_compared_as_given_not_through_a_sigmoid() -> None:
    scores = torch.tensor([40.0, 39.0, 38.0])  # all 1.0 as float32 probabilities
    assert average_precision(scores, torch.tensor([1, 0, 0])).item() == 1


def test_the_mean_leaves_out_classes_and_counts_the_rest() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.4, 0.6]])
    targets = torch.tensor([[1, 0, 1], [0, -1, 0]])
    assert mean_average_precision(scores, targets) == (pytest.approx((1 + 0.5) / 2), 2)


@pytest.mark.parametrize("num_images", [0, 1, 5])
def test_without_any_positive_the_mean_is_nan_over_0_classes(num_images: int) -> None:
    mean, classes = mean_average_precision(torch.zeros(num_images, 3), torch.zeros(num_images, 3, dtype=torch.int8))
    assert math.isnan(mean)
    assert classes == 0


def test_large_random_input_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(5000, 20)).astype(np.float32)
    targets = rng.random((5000, 20)) < 0.05
    mean, classes = mean_average_precision(torch.from_numpy(scores), torch.from_numpy(targets))
    assert classes == 20
    assert mean == pytest.approx(average_precision_score(targets, scores, average="macro"), abs=1e-12)


def test_scores_without_a_ranking_are_refused() -> None:
    zeros = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"scores of shape \(2, 3\) and targets of shape \(3, 2\) do not match"):
        average_precision(zeros, zeros.T.long())
    with pytest.raises(ValueError, match="do not match"):
        average_precision(zeros[None], zeros[None].long())
    with pytest.raises(TypeError, match=r"targets of torch\.float32 are ambiguous"):
        average_precision(zeros, zeros)
    with pytest.raises(ValueError, match="values other than 1"):
        average_precision(zeros, zeros.long() + 2)
    with pytest.raises(ValueError, match="scores contain NaN"):
        average_precision(zeros + torch.nan, zeros.long())
    with pytest.raises(ValueError, match=r"scores of shape \(3,\) have no label axis"):
        mean_average_precision(zeros[0], zeros[0].long())
