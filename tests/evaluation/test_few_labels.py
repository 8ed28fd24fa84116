"""The probe with few labels: fixed nested subsets, and no choice of strength on too few images."""

from __future__ import annotations

import math

import pytest
import torch

from mlssl.evaluation import few_labels as module
from mlssl.evaluation.features import Features
from mlssl.evaluation.few_labels import FIXED_STRENGTH, few_labels_probe
from mlssl.evaluation.probe import linear_probe


def made(num_images: int, seed: int) -> Features:
    world = torch.Generator().manual_seed(100)
    causes = torch.randn(12, 6, generator=world)
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_images, 12, generator=generator)
    shift = torch.tensor([0.0, 0, 0, 0, 4, 9])  # rare classes, missing in a small subset
    return Features(features, (features @ causes > shift).to(torch.int8), torch.arange(num_images))


def test_whole_training_set_is_the_linear_probe_and_fewer_labels_are_worse() -> None:
    train, test = made(500, 0), made(300, 1)
    few, some, whole = few_labels_probe(train, test, (0.02, 0.2, 1.0), num_subsets=3)
    probe = linear_probe(train, test)
    assert whole.mAPs == (probe.mAP,)
    assert whole.strengths == (probe.strength,)
    assert math.isnan(whole.spread)
    assert few.mean < some.mean < whole.mean
    assert (few.num_images, some.num_images, whole.num_images) == (10, 100, 500)
    assert len(few.mAPs) == len(some.mAPs) == 3
    assert few.spread == pytest.approx(torch.tensor(few.mAPs).std().item(), rel=1e-4)


def test_strength_is_fixed_below_a_tenth_of_the_labels_and_chosen_above() -> None:
    train, test = made(500, 0), made(100, 1)
    below, at = few_labels_probe(train, test, (0.098, 0.1), num_subsets=2)
    assert below.strengths == (FIXED_STRENGTH, FIXED_STRENGTH)
    for subset, (strength, mean) in enumerate(zip(at.strengths, at.mAPs, strict=True)):
        rows = torch.randperm(500, generator=torch.Generator().manual_seed(subset))[:50].sort().values
        part = Features(train.features[rows], train.labels[rows], rows)  # type: ignore[index]
        probe = linear_probe(part, test)
        assert (strength, mean) == (probe.strength, probe.mAP)
        assert len(probe.validation) > 1


def test_classes_seen_are_counted() -> None:
    train, test = made(500, 0), made(300, 1)
    (few,) = few_labels_probe(train, test, (0.02,), num_subsets=4)
    for subset, seen in enumerate(few.classes_seen):
        rows = torch.randperm(500, generator=torch.Generator().manual_seed(subset))[:10]
        labels = train.labels[rows]  # type: ignore[index]
        assert seen == sum(0 < labels[:, label].sum() < 10 for label in range(6))
    assert min(few.classes_seen) < 6


def test_subsets_depend_only_on_the_seed_and_are_nested(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list[int]] = []

    def watched(train: Features, test: Features, **settings: object) -> object:
        taken.append(train.image_ids.tolist())
        return linear_probe(train, test, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "linear_probe", watched)
    train, test = made(200, 0), made(100, 1)
    other = train._replace(features=torch.randn(200, 12))  # another backbone
    for features in (train, other):
        few_labels_probe(features, test, (0.05, 0.5), num_subsets=2)
    assert taken[:4] == taken[4:]
    assert set(taken[0]) < set(taken[2])
    assert taken[0] != taken[1]
    few_labels_probe(train, test, (0.05,), num_subsets=2, seed=1)
    assert taken[8] not in taken[:2]


def test_invalid_fractions_are_refused() -> None:
    train, test = made(50, 0), made(50, 1)
    for fraction in (0.0, 1.1, 0.02, math.nan):
        with pytest.raises(ValueError, match=f"fraction {fraction} of 50 training images was given"):
            few_labels_probe(train, test, (fraction,))
    with pytest.raises(ValueError, match="num_subsets=0 was given"):
        few_labels_probe(train, test, num_subsets=0)
    with pytest.raises(ValueError, match="test features have no labels"):
        few_labels_probe(train, test._replace(labels=None))
