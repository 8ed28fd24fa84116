"""The bootstrap: equality with single resamples, coverage, and the difference of two backbones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlssl.evaluation.bootstrap import bootstrap_interval, interval_of, resample
from mlssl.evaluation.metrics import mean_average_precision


def scored(count: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(-1, 2, (count, 5), generator=generator)
    targets[:, 4] = targets[:, 4].clamp(max=0)
    # Few levels, so that many images are tied.
    scores = (targets + 3 * torch.rand(count, 5, generator=generator)).mul(4).round()
    return scores, targets


def test_the_interval_equals_that_of_single_resamples() -> None:
    scores, targets = scored()
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randint(60, (200, 60), generator=generator)
    means = torch.tensor([mean_average_precision(scores[rows], targets[rows])[0] for rows in drawn]).double()
    bias = means.mean() - mean_average_precision(scores, targets)[0]
    expected = (means.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)) - bias).tolist()
    assert bootstrap_interval(scores, targets, num_resamples=200, confidence=0.9, seed=5) == pytest.approx(expected)


def test_the_interval_contains_the_mean_shrinks_with_images_and_repeats() -> None:
    widths = []
    for count in (50, 800):
        scores, targets = scored(count)
        low, high = bootstrap_interval(scores, targets, num_resamples=200)
        assert low < mean_average_precision(scores, targets)[0] < high
        assert (low, high) == bootstrap_interval(scores, targets, num_resamples=200)
        widths.append(high - low)
    assert 2.5 < widths[0] / widths[1] < 6, "as the root of 16"


def test_the_interval_of_rare_classes_contains_the_scores_on_other_images() -> None:
    generator = torch.Generator().manual_seed(0)

    def test_set() -> tuple[torch.Tensor, torch.Tensor]:
        targets = (torch.rand(100, 20, generator=generator) < 0.03).long()
        targets[0] = 1  # every class is in the mean of every set
        return targets + torch.randn(100, 20, generator=generator), targets

    usual = float(np.mean([mean_average_precision(*test_set())[0] for _ in range(300)]))
    ends = np.array([bootstrap_interval(*test_set(), num_resamples=200) for _ in range(40)])
    inside = (ends[:, 0] <= usual) & (usual <= ends[:, 1])
    assert inside.mean() > 0.85
    assert abs(ends.mean() - usual) < 0.02, "without the correction the middle lies 0.036 too high"


def test_interval_without_a_positive_is_nan_and_bad_numbers_are_refused() -> None:
    scores, targets = scored()
    assert np.isnan(bootstrap_interval(scores, targets.clamp(max=0))).all()
    for numbers in ({"num_resamples": 0}, {"confidence": 1.0}, {"confidence": 0.0}):
        with pytest.raises(
            ValueError, match=r"(num_resamples=0 was given: pass at least 1|confidence=[01].0 was given: pass a number)"
        ):
            bootstrap_interval(scores, targets, **numbers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="have no label axis"):
        bootstrap_interval(scores[:, 0], targets[:, 0])


def test_a_paired_difference_uses_the_same_resamples_and_is_narrower_than_unpaired() -> None:
    scores, targets = scored(300)
    better = scores + 0.5 * targets
    means = [resample(one, targets, num_resamples=200, seed=3).means for one in (scores, better)]
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(300, (200, 300), generator=generator)
    expected = [
        mean_average_precision(better[rows], targets[rows])[0] - mean_average_precision(scores[rows], targets[rows])[0]
        for rows in drawn
    ]
    assert (means[1] - means[0]).tolist() == pytest.approx(expected, abs=1e-6)
    estimates = [mean_average_precision(one, targets)[0] for one in (scores, better)]
    low, high = interval_of(means[1] - means[0], estimates[1] - estimates[0])
    assert 0 < low < estimates[1] - estimates[0] < high
    first, second = (interval_of(*pair) for pair in zip(means, estimates, strict=True))
    assert high - low < 0.5 * ((first[1] - first[0]) + (second[1] - second[0]))


def test_resamples_without_any_class_are_left_out() -> None:
    scores, targets = torch.tensor([[2.0], [1.0]]), torch.tensor([[1], [0]])
    means = resample(scores, targets, num_resamples=50).means
    assert 0 < means.isnan().sum() < 50, "of two images, one may be drawn twice"
    assert interval_of(means, 1.0) == (1.0, 1.0)


def test_the_interval_of_a_class_does_not_depend_on_others() -> None:
    scores, targets = scored()
    found = resample(scores, targets, num_resamples=200, seed=5).class_intervals
    assert found[4].isnan().all(), "a class without a positive"
    for label in range(4):
        alone = bootstrap_interval(scores[:, [label]], targets[:, [label]], num_resamples=200, seed=5)
        assert found[label].tolist() == pytest.approx(alone)
