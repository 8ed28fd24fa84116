"""Thresholds against a slow loop, calibration against torch's optimizer, and both with few labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mlssl.tagging.thresholds import NEVER, Calibration, _cut, calibrate, choose_thresholds


def drawn(count: int, labels: int, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Calibrated probabilities, and targets."""
    rng = torch.Generator().manual_seed(seed)
    targets = (torch.rand(count, labels, generator=rng) < share).long()
    logits = 2.5 * targets - 1.5 + torch.randn(count, labels, generator=rng)
    return logits.sigmoid(), targets


def f1(probabilities: Tensor, targets: Tensor, threshold: float) -> float:
    known = targets >= 0
    given, there = (probabilities > threshold)[known], (targets == 1)[known]
    return (2 * (given & there).sum() / (given.sum() + there.sum()).clamp(min=1)).item()


def best_cut(probabilities: Tensor, targets: Tensor, precision: float | None = None) -> Tensor:
    order = probabilities.argsort(dim=0, descending=True, stable=True)
    ranked = probabilities.gather(0, order)
    below = torch.cat([ranked[1:], torch.zeros(1, ranked.shape[1])])
    there, known = (value.gather(0, order).float() for value in (targets == 1, targets >= 0))
    return _cut((ranked + below) / 2, ranked == below, there, known, None, precision)


@pytest.mark.parametrize("with_ties", [False, True])
def test_no_threshold_has_a_better_f1(with_ties: bool) -> None:
    probabilities, targets = drawn(200, 4, 0.2)
    targets[::7, 1] = -1
    if with_ties:
        probabilities = (10 * probabilities).round() / 10
    cuts = best_cut(probabilities, targets)
    for label in range(4):
        every = [f1(probabilities[:, label], targets[:, label], threshold) for threshold in torch.linspace(0, 1, 501)]
        assert f1(probabilities[:, label], targets[:, label], cuts[label]) >= max(every) - 1e-6


@pytest.mark.parametrize("precision", [0.5, 0.8, 0.95])
def test_a_target_precision_is_reached_with_as_many_images_as_possible(precision: float) -> None:
    probabilities, targets = drawn(400, 3, 0.3)
    found = choose_thresholds(probabilities, targets, precision=precision)
    for label in range(3):
        given = probabilities[:, label] > found.values[label]
        assert (targets[given, label] == 1).float().mean() >= precision
        ranked = probabilities[:, label].sort(descending=True).indices
        more = [
            int(k) for k in range(int(given.sum()) + 1, 401) if targets[ranked[:k], label].float().mean() >= precision
        ]
        assert not more


def test_the_median_of_resamples_is_in_its_interval_and_few_positives_make_it_wide() -> None:
    probabilities, targets = drawn(2000, 1, 0.2)
    many = choose_thresholds(probabilities, targets)
    few = choose_thresholds(probabilities[:40], targets[:40])
    for found in (many, few):
        assert found.low <= found.values <= found.high
    assert few.positives < 15
    assert (few.high - few.low) > 2 * (many.high - many.low)
    assert f1(probabilities[:, 0], targets[:, 0], many.values[0]) > 0.98 * f1(
        probabilities[:, 0], targets[:, 0], best_cut(probabilities, targets)[0]
    )


def test_a_label_without_positives_or_precision_is_never_predicted() -> None:
    probabilities = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.zeros(50, 3, dtype=torch.long)
    targets[probabilities[:, 1].argmin(), 1] = 1
    targets[:, 2] = -1
    wanted = choose_thresholds(probabilities, targets, precision=0.9)
    assert wanted.values.tolist() == [NEVER] * 3
    best = choose_thresholds(probabilities, targets)
    assert (best.values[0], best.values[2]) == (NEVER, NEVER)
    assert best.positives.tolist() == [0, 1, 0]
    assert not (torch.ones(1) > NEVER).any(), "a probability of 1 is not above it"


@pytest.mark.parametrize("precision", [0.0, -1.0, 1.1])
def test_a_precision_out_of_range_is_refused(precision: float) -> None:
    with pytest.raises(ValueError, match="pass a fraction above 0 and at most 1"):
        choose_thresholds(torch.rand(4, 1), torch.ones(4, 1, dtype=torch.long), precision=precision)


def test_calibration_undoes_a_slope_and_a_shift() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20000, 2, generator=rng) - 1
    targets = (torch.rand(20000, 2, generator=rng) < logits.sigmoid()).long()
    targets[::9] = -1
    found = calibrate(3 * logits + 4, targets)
    assert found.slope == pytest.approx(1 / 3, rel=0.05)
    assert found.shift == pytest.approx(-4 / 3, rel=0.1)
    torch.testing.assert_close(found(3 * logits + 4), logits.sigmoid(), atol=0.02, rtol=0)


def test_perfectly_separated_labels_get_a_finite_slope() -> None:
    logits = torch.linspace(-2, 2, 40)[:, None]
    found = calibrate(logits, (logits > 0).long())
    assert 1 < found.slope < 200
    assert 0.9 < found(torch.tensor(2.0)) < 1


@pytest.mark.parametrize("value", [0, 1, -1])
def test_without_both_kinds_of_labels_or_with_a_wrong_order_probabilities_do_not_change(value: int) -> None:
    logits = torch.linspace(-2, 2, 20)[:, None]
    assert calibrate(logits, torch.full((20, 1), value)) == Calibration(1.0, 0.0)
    assert calibrate(logits, (logits < 0).long()) == Calibration(1.0, 0.0)
