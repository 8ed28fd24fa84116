"""OP/OR/OF1, CP/CR/CF1 and their top 3: scikit-learn, a slow loop, 1, 2 and 4 processes, refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_score, recall_score
from torch import Tensor

from mlssl.evaluation.bootstrap import bootstrap_interval
from mlssl.evaluation.metrics import (
    MultiLabelAveragePrecision,
    MultiLabelScores,
    average_precision,
    first_indices,
    multilabel_scores,
)

NAMES = [f"{kind}{name}{top}" for top in ("", "@3") for kind in "OC" for name in ("P", "R", "F1")]


def made(num_images: int = 60, num_labels: int = 8, seed: int = 0, unknown: bool = True) -> tuple[Tensor, Tensor]:
    """Probabilities and targets with a class without a positive (2) and one that is never predicted (5)."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(-1 if unknown else 0, 2, (num_images, num_labels), generator=generator)
    targets[:, 2] = targets[:, 2].clamp(max=0)
    probabilities = torch.rand(num_images, num_labels, generator=generator)
    probabilities[:, 5] *= 0.3
    return probabilities, targets


def slow_scores(probabilities: Tensor, targets: Tensor, threshold: float, top_k: int | None) -> dict[str, float]:
    """Counts, image by image and label by label."""
    num_labels = targets.shape[1]
    right, predicted, present = ([0] * num_labels for _ in range(3))
    for row, truth in zip(probabilities.tolist(), targets.tolist(), strict=True):
        known = [label for label in range(num_labels) if truth[label] != -1]
        allowed = known if top_k is None else sorted(known, key=lambda label: -row[label])[:top_k]
        for label in known:
            says = label in allowed and row[label] >= threshold
            predicted[label] += says
            present[label] += truth[label]
            right[label] += says and truth[label]
    counted = [label for label in range(num_labels) if present[label]]

    def share(part: float, whole: float) -> float:
        return part / whole if whole else 0.0

    op, recall = share(sum(right), sum(predicted)), share(sum(right), sum(present))
    cp = sum(share(right[label], predicted[label]) for label in counted) / len(counted)
    cr = sum(share(right[label], present[label]) for label in counted) / len(counted)
    return {
        **{"OP": op, "OR": recall, "OF1": share(2 * op * recall, op + recall)},
        **{"CP": cp, "CR": cr, "CF1": share(2 * cp * cr, cp + cr)},
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.6457, 1.0])
def test_equals_a_slow_loop(threshold: float, seed: int) -> None:
    probabilities, targets = made(seed=seed)
    scores = multilabel_scores(probabilities, targets, threshold=threshold)
    expected = slow_scores(probabilities, targets, threshold, None)
    expected |= {f"{name}@3": value for name, value in slow_scores(probabilities, targets, threshold, 3).items()}
    assert {name: scores[name] for name in NAMES} == pytest.approx(expected)
    assert list(scores) == ["mAP", *NAMES, "classes"]


def test_equals_scikit_learn() -> None:
    probabilities, targets = made(unknown=False)
    scores = multilabel_scores(probabilities, targets, threshold=0.4)
    truth, predicted = targets.numpy(), (probabilities >= 0.4).numpy()
    there = truth.any(0)
    assert scores["OP"] == pytest.approx(precision_score(truth, predicted, average="micro"))
    assert scores["OR"] == pytest.approx(recall_score(truth, predicted, average="micro"))
    by_class = {"average": "macro", "zero_division": 0.0}
    assert scores["CP"] == pytest.approx(precision_score(truth[:, there], predicted[:, there], **by_class))
    assert scores["CR"] == pytest.approx(recall_score(truth[:, there], predicted[:, there], **by_class))
    reference = average_precision_score(truth[:, there], probabilities.numpy()[:, there], average="macro")
    assert scores["mAP"] == pytest.approx(reference)
    assert scores["classes"] == there.sum() == 7


def test_cf1_is_the_harmonic_mean_of_the_means() -> None:
    scores = multilabel_scores(torch.tensor([[0.9, 0.9], [0.1, 0.9]]), torch.tensor([[1, 0], [0, 1]]))
    assert (scores["CP"], scores["CR"]) == (0.75, 1.0)
    assert scores["CF1"] == pytest.approx(2 * 0.75 / 1.75)
    assert scores["CF1"] != pytest.approx((1 + 2 / 3) / 2), "the mean of the classes' F1"


def test_overall_scores_keep_classes_without_positives_and_class_scores_leave_them_out() -> None:
    probabilities, targets = torch.tensor([[0.9, 0.8], [0.1, 0.2]]), torch.tensor([[1, 0], [0, 0]])
    scores = multilabel_scores(probabilities, targets)
    assert (scores["OP"], scores["CP"], scores["classes"]) == (0.5, 1.0, 1)


def test_class_scores_leave_out_a_class_without_a_known_negative() -> None:
    draws = torch.Generator().manual_seed(0)
    for absent in (1, -1):  # noise scores 1.0 on a class that is 1 or unknown, whatever the scores are
        probabilities = torch.rand(20, 3, generator=draws)
        targets = torch.where(torch.rand(20, 3, generator=draws) < 0.5, 1, absent)
        assert average_precision(probabilities, targets).isnan().all()
        scores = multilabel_scores(probabilities, targets)
        assert scores["classes"] == 0
        assert all(math.isnan(scores[name]) for name in ("mAP", "CP", "CR"))
        assert all(math.isnan(end) for end in bootstrap_interval(probabilities, targets, num_resamples=10))
        targets[:, 0] = torch.arange(20) % 2
        expected = average_precision(probabilities[:, 0], targets[:, 0]).item()
        assert multilabel_scores(probabilities, targets)["mAP"] == pytest.approx(expected)
        low, high = bootstrap_interval(probabilities, targets, num_resamples=100)
        assert low <= expected <= high


def test_the_top_k_contain_no_unknown_label_and_ties_take_the_first_columns() -> None:
    probabilities = torch.tensor([[0.9, 0.9, 0.8, 0.8, 0.8]])
    scores = multilabel_scores(probabilities, torch.tensor([[-1, 1, 0, 1, 1]]))
    assert scores["OP@3"] == pytest.approx(2 / 3)  # columns 1, 2 and 3
    assert scores["OR@3"] == pytest.approx(2 / 3)
    only_two = multilabel_scores(torch.tensor([[0.9, 0.6, 0.4]]), torch.tensor([[1, 1, 1]]))
    assert (only_two["OP@3"], only_two["OR@3"]) == (1, pytest.approx(2 / 3)), "below the threshold is not predicted"


def test_a_threshold_includes_its_own_value() -> None:
    probabilities, targets = torch.tensor([[0.5, 0.49999997]]), torch.tensor([[1, 1]])
    assert multilabel_scores(probabilities, targets)["OR"] == 0.5


def test_unknown_labels_change_nothing() -> None:
    probabilities, targets = made()
    extra = torch.full((7, 8), -1)
    scores = multilabel_scores(torch.cat([probabilities, torch.rand(7, 8)]), torch.cat([targets, extra]))
    assert scores == multilabel_scores(probabilities, targets)


@pytest.mark.parametrize("num_images", [0, 4])
def test_without_any_positive_class_means_are_nan(num_images: int) -> None:
    scores = multilabel_scores(torch.full((num_images, 3), 0.9), torch.zeros(num_images, 3, dtype=torch.int8))
    assert all(math.isnan(scores[name]) for name in ("mAP", "CP", "CR", "CF1"))
    assert [scores[name] for name in ("OP", "OR", "OF1", "classes")] == [0, 0, 0, 0]


def test_a_top_k_above_the_number_of_labels_means_all() -> None:
    probabilities, targets = made()
    scores = multilabel_scores(probabilities, targets, top_k=100)
    assert scores["OF1@100"] == scores["OF1"]


# ---------------------------------------------------------------------- the metric


def fed(metric: Any, probabilities: Tensor, targets: Tensor, lines: list[int], batch: int = 7) -> Any:
    for start in range(0, len(lines), batch):
        rows = torch.tensor(lines[start : start + batch])
        metric.update(probabilities[rows], targets[rows], rows + 1000)
    return metric


def share_of(rank: int, processes: int, images: int) -> list[int]:
    """Images of a process by torch's DistributedSampler: padded with the first ones to equal shares."""
    padded = [*range(images), *range(-images % processes)]
    return padded[rank::processes]


def scores_of_this_process(processes: int) -> tuple[dict[str, float], list[float]]:
    rank = torch.distributed.get_rank()
    probabilities, targets = made(61)
    lines = share_of(rank, processes, 61)
    scores = fed(MultiLabelScores(threshold=0.4), probabilities, targets, lines).compute()
    precision = fed(MultiLabelAveragePrecision(), probabilities, targets, lines).compute()
    return {name: value.item() for name, value in scores.items()}, precision.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_every_process_has_the_scores_of_a_single_process(devices: int, processes: Any) -> None:
    probabilities, targets = made(61)
    assert devices == 1 or len(share_of(0, devices, 61)) * devices > 61, "the sampler pads"
    expected = multilabel_scores(probabilities, targets, threshold=0.4)
    by_class = average_precision(probabilities, targets).float().tolist()
    for scores, precision in processes.run(scores_of_this_process, devices, processes=devices):
        assert scores == pytest.approx(expected, rel=1e-6)
        assert precision == pytest.approx(by_class, nan_ok=True, rel=1e-6)


def test_padding_would_have_changed_the_result() -> None:
    probabilities, targets = made(5, unknown=False)
    lines = [0, 1, 2, 3, 4, 0, 1, 2]
    padded = torch.tensor(lines)
    assert multilabel_scores(probabilities[padded], targets[padded]) != multilabel_scores(probabilities, targets)
    metric = fed(MultiLabelScores(), probabilities, targets, lines)
    assert metric.compute()["OF1"].item() == pytest.approx(multilabel_scores(probabilities, targets)["OF1"])


def test_the_metric_restarts_after_reset_and_avoids_half_precision() -> None:
    probabilities, targets = made()
    metric = fed(MultiLabelScores(), probabilities.flip(0), targets, list(range(60)))
    metric.reset()
    fed(metric, probabilities.bfloat16(), targets, list(range(60)))
    assert metric.probabilities[0].dtype == torch.float32
    rounded = multilabel_scores(probabilities.bfloat16().float(), targets)
    assert metric.compute()["mAP"].item() == pytest.approx(rounded["mAP"])


def test_first_indices_of_values() -> None:
    values = np.random.default_rng(0).integers(0, 9, 40)
    expected = sorted(np.unique(values, return_index=True)[1].tolist())
    assert first_indices(torch.from_numpy(values)).tolist() == expected
    assert first_indices(torch.zeros(0, dtype=torch.int64)).tolist() == []


# ---------------------------------------------------------------------- what is refused


def test_invalid_scores_are_refused() -> None:
    probabilities, targets = made()
    with pytest.raises(ValueError, match="probabilities are between -1 and 2, expected 0 to 1: take the sigmoid"):
        multilabel_scores(torch.tensor([[-1.0, 2.0]]), torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="scores contain NaN"):
        multilabel_scores(probabilities + torch.nan, targets)
    with pytest.raises(ValueError, match=r"probabilities of shape \(8,\) were given: pass \(n, L\)"):
        multilabel_scores(probabilities[0], targets[0])
    with pytest.raises(ValueError, match=r"\(60, 8\) and targets of shape \(60, 7\) do not match"):
        multilabel_scores(probabilities, targets[:, :7])
    with pytest.raises(TypeError, match="are ambiguous"):
        multilabel_scores(probabilities, targets.float())
    with pytest.raises(ValueError, match="values other than 1"):
        multilabel_scores(probabilities, torch.full_like(targets, 257))  # a cast to int8 would give 1
    for threshold in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"threshold={threshold} was given"):
            multilabel_scores(probabilities, targets, threshold=threshold)
        with pytest.raises(ValueError, match=f"threshold={threshold} was given"):
            MultiLabelScores(threshold=threshold)
    with pytest.raises(ValueError, match="top_k=0 was given"):
        multilabel_scores(probabilities, targets, top_k=0)
    with pytest.raises(ValueError, match=r"image_ids of shape \(59,\) were given for 60 images"):
        MultiLabelScores().update(probabilities, targets, torch.arange(59))
    with pytest.raises(TypeError, match="are ambiguous"):
        MultiLabelAveragePrecision().update(probabilities, targets.double(), torch.arange(60))
