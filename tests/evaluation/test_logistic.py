"""The solver: weighted positives, features read again in every pass, and labels in groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mlssl.evaluation import logistic
from mlssl.evaluation.features import Features
from mlssl.evaluation.logistic import StandardisedRows, logistic_regression
from mlssl.evaluation.probe import linear_probe


def made(count: int, seed: int, labels: int = 4, width: int = 10) -> Features:
    causes = torch.randn(width, labels, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    features = 3 + 2 * torch.randn(count, width, generator=generator)
    noise = 3 * torch.randn(count, labels, generator=generator)
    logits = (features - 3) @ causes + noise - 3
    return Features(features, (logits > 0).to(torch.int8), torch.arange(count))


@pytest.mark.parametrize("pos_weight", [0.25, 2.0, "balanced"])
def test_weighted_positives_match_scikit_learn(pos_weight: float | str) -> None:
    data = made(300, 0)
    assert data.labels is not None
    solution = logistic_regression(data.features, data.labels, [0.01], pos_weight=pos_weight)  # type: ignore[arg-type]
    logits = solution.logits(data.features)[0]
    inputs = ((data.features - data.features.mean(0)) / data.features.std(0, correction=0)).double().numpy()
    for label in range(4):
        target = data.labels[:, label].numpy()
        positives = target.sum()
        weight = (300 - positives) / positives if pos_weight == "balanced" else pos_weight
        total = positives * weight + 300 - positives  # scikit-learn's loss is a sum, ours is a mean
        reference = LogisticRegression(
            C=1 / (0.01 * total), class_weight={0: 1, 1: weight}, tol=1e-8, max_iter=10_000
        ).fit(inputs, target)
        ours = logits[:, label].sigmoid().numpy()
        assert np.abs(ours - reference.predict_proba(inputs)[:, 1]).max() < 1e-3


def test_features_read_again_in_every_pass_give_the_same_solution(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train, test = made(200, 0), made(100, 1)
    held = linear_probe(train, test, num_resamples=0)
    np.save(tmp_path / "features.npy", train.features.numpy())
    mapped = train._replace(features=torch.from_numpy(np.load(tmp_path / "features.npy", mmap_mode="c")))
    monkeypatch.setattr(logistic, "IN_MEMORY_BYTES", 0)
    monkeypatch.setitem(logistic.PIECE_NUMBERS, "cpu", 70)  # seven lines
    anew = linear_probe(mapped, test, num_resamples=0)
    assert anew.strength == held.strength
    torch.testing.assert_close(anew.scores, held.scores, rtol=1e-3, atol=1e-3)


def test_labels_in_groups_give_the_same_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = made(200, 0), made(100, 1)
    together = linear_probe(train, test, num_resamples=0)
    monkeypatch.setattr(logistic, "LOGIT_BYTES", 1)
    alone = linear_probe(train, test, num_resamples=0)
    assert alone.strength == together.strength
    assert alone.validation == pytest.approx(together.validation, abs=1e-6)
    torch.testing.assert_close(alone.scores, together.scores, rtol=1e-3, atol=1e-3)


def test_half_precision_features_are_close() -> None:
    train, test = made(300, 0), made(200, 1)
    halves = [data._replace(features=data.features.half()) for data in (train, test)]
    assert linear_probe(*halves, num_resamples=0).mAP == pytest.approx(linear_probe(train, test).mAP, abs=5e-3)


def test_a_selection_of_rows_is_standardised_by_its_own_statistics() -> None:
    data = made(50, 0)
    rows = torch.arange(5, 45, 2)
    lines = torch.cat([piece for _, piece in StandardisedRows(data.features, rows)])
    torch.testing.assert_close(lines.mean(0), torch.zeros(10), rtol=0, atol=1e-5)
    torch.testing.assert_close(lines.std(0, correction=0), torch.ones(10), rtol=0, atol=1e-5)


def test_a_label_without_training_positives_is_counted_and_scores_all_images_equally() -> None:
    train, test = made(100, 0), made(80, 1)
    labels = train.labels.clone()  # type: ignore[union-attr]
    labels[:, 2] = 0
    result = linear_probe(train._replace(labels=labels), test)
    assert result.num_learned == 3
    assert result.num_classes == 4
    assert result.scores[:, 2].unique().numel() == 1
    share = (test.labels[:, 2] == 1).float().mean().item()  # type: ignore[index]
    assert result.average_precision[2].item() == pytest.approx(share)


def test_an_invalid_weight_is_refused() -> None:
    data = made(20, 0)
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"pos_weight={weight} was given: pass a number above 0, or 'balanced'"):
            logistic_regression(data.features, data.labels, [1.0], pos_weight=weight)  # type: ignore[arg-type]
