"""The linear probe: scikit-learn's solutions, an honest choice of strength, clear refusals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mlssl.evaluation.features import Features
from mlssl.evaluation.logistic import logistic_regression
from mlssl.evaluation.metrics import mean_average_precision
from mlssl.evaluation.probe import STRENGTHS, linear_probe

NUM_LABELS = 5


def made(num_images: int, seed: int, noise: float = 1.0, width: int = 24) -> Features:
    """Correlated features of very different scales, and labels that depend on a few hidden directions."""
    rng = torch.Generator().manual_seed(100)  # the same world for every split
    mix, causes = torch.randn(8, width, generator=rng), torch.randn(8, NUM_LABELS, generator=rng)
    scale, shift = 10 ** torch.linspace(-2, 2, width), 3 * torch.randn(width, generator=rng)
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_images, 8, generator=rng)
    features = (hidden @ mix + 0.3 * torch.randn(num_images, width, generator=rng) + shift) * scale
    logits = hidden @ causes - 2.5 + noise * torch.randn(num_images, NUM_LABELS, generator=rng)
    return Features(features, (logits > 0).to(torch.int8), torch.arange(num_images))


def standardized(features: Tensor) -> Tensor:
    return (features - features.mean(0)) / features.std(0, correction=0)


def solved(inputs: Tensor, labels: Tensor, strengths: Sequence[float], **settings: Any) -> list[tuple[Tensor, Tensor]]:
    """Weights (D, L) and bias (L,) for each strength."""
    solution = logistic_regression(inputs, labels, strengths, **settings)
    return list(zip(solution.weights, solution.bias, strict=True))


@pytest.mark.parametrize("strengths", [STRENGTHS[::-1], (0.01,), (0.0001, 1.0)], ids=["path", "one", "rising"])
def test_solutions_equal_those_of_scikit_learn(strengths: tuple[float, ...]) -> None:
    data = made(400, seed=0)
    inputs, labels = standardized(data.features), data.labels
    assert labels is not None
    solutions = solved(inputs, labels, strengths)
    for strength, (weights, bias) in zip(strengths, solutions, strict=True):
        ours = (inputs @ weights + bias).sigmoid().numpy()
        for label in range(NUM_LABELS):
            reference = LogisticRegression(C=1 / (strength * len(inputs)), tol=1e-8, max_iter=10_000)
            reference.fit(inputs.double().numpy(), labels[:, label].numpy())
            theirs = reference.predict_proba(inputs.double().numpy())[:, 1]
            assert np.abs(ours[:, label] - theirs).max() < 1e-3, (strength, label)


def test_more_features_than_images_and_separable_labels_converge() -> None:
    data = made(40, seed=0, noise=0.0, width=80)
    inputs, labels = standardized(data.features), data.labels
    assert labels is not None
    ((weights, bias),) = solved(inputs, labels, [1e-3])
    weights, bias = weights.double().requires_grad_(), bias.double().requires_grad_()
    log_loss = torch.nn.BCEWithLogitsLoss(reduction="none")
    loss = log_loss(inputs.double() @ weights + bias, labels.double()).mean(0) + 0.5e-3 * (weights**2).sum(0)
    loss.sum().backward()
    assert weights.grad is not None
    assert bias.grad is not None
    learnable = labels.bool().any(0)  # torch's versions draw other data, and so rare a label may have no positive
    assert learnable.sum() >= 3
    assert (weights.grad.norm(dim=0) < 2e-3 * loss.detach())[learnable].all()
    assert (bias.grad.abs() < 2e-3 * loss.detach())[learnable].all()


def test_unknown_labels_are_equivalent_to_missing_images() -> None:
    data = made(300, seed=0)
    inputs, labels = standardized(data.features), data.labels.clone()  # type: ignore[union-attr]
    labels[200:, 0] = -1
    ((weights, bias),) = solved(inputs, labels, [0.01])
    reference = LogisticRegression(C=1 / (0.01 * 200), tol=1e-8, max_iter=10_000)
    reference.fit(inputs[:200].double().numpy(), labels[:200, 0].numpy())
    theirs = reference.predict_proba(inputs.double().numpy())[:, 1]
    assert np.abs((inputs @ weights + bias).sigmoid()[:, 0].numpy() - theirs).max() < 1e-3


def test_labels_that_cannot_be_learned_score_a_constant() -> None:
    train, test = made(200, seed=0), made(100, seed=1)
    labels = train.labels.clone()  # type: ignore[union-attr]
    labels[:, 1], labels[:, 2], labels[:, 3] = 0, 1, -1
    result = linear_probe(train._replace(labels=labels), test)
    assert (result.scores[:, 1:4] == 0).all()
    share = test.labels[:, 1].float().mean().item()  # type: ignore[index]
    assert result.average_precision[1].item() == pytest.approx(share)
    assert result.num_classes == NUM_LABELS


def test_strength_is_chosen_only_on_held_out_training_images() -> None:
    train, test = made(300, seed=0, noise=3.0), made(200, seed=1, noise=3.0)
    result = linear_probe(train, test)
    assert sorted(result.validation) == sorted(STRENGTHS)
    assert result.validation[result.strength] == max(result.validation.values())
    shuffled = test._replace(labels=test.labels[torch.randperm(200)])  # type: ignore[index]
    other_labels = linear_probe(train, shuffled)
    assert other_labels.strength == result.strength
    assert other_labels.validation == result.validation
    assert torch.equal(other_labels.scores, result.scores)


def test_the_probe_is_refitted_on_the_whole_training_set() -> None:
    train, test = made(300, seed=0), made(200, seed=1)
    result = linear_probe(train, test)
    alone = linear_probe(train, test, strengths=[result.strength])
    assert alone.validation == {}
    torch.testing.assert_close(alone.scores, result.scores)
    assert (result.mAP, result.num_classes) == mean_average_precision(result.scores, test.labels)  # type: ignore[arg-type]


def test_a_seed_repeats_the_result_and_the_global_state_does_not_change() -> None:
    train, test = made(200, seed=0), made(100, seed=1)
    before = torch.random.get_rng_state()
    first, second = linear_probe(train, test, seed=3), linear_probe(train, test, seed=3)
    assert torch.equal(first.scores, second.scores)
    assert first.validation == second.validation
    assert first.validation != linear_probe(train, test, seed=4).validation
    assert torch.equal(before, torch.random.get_rng_state())


def test_scale_and_shift_of_a_feature_do_not_matter() -> None:
    train, test = made(200, seed=0), made(100, seed=1)
    factor, shift = 10 ** torch.linspace(-3, 3, 24), torch.linspace(-5, 5, 24)
    moved = [data._replace(features=(data.features + shift) * factor) for data in (train, test)]
    assert linear_probe(*moved).mAP == pytest.approx(linear_probe(train, test).mAP, abs=2e-3)


def test_a_feature_that_is_constant_in_training_is_ignored() -> None:
    train, test = made(200, seed=0), made(100, seed=1)
    train_wider = train._replace(features=torch.cat([train.features, torch.full((200, 1), 0.1)], 1))
    test_wider = test._replace(features=torch.cat([test.features, torch.randn(100, 1)], 1))
    wider, alone = (linear_probe(*sets).scores.sigmoid() for sets in ((train_wider, test_wider), (train, test)))
    torch.testing.assert_close(wider, alone, rtol=0, atol=2e-3)  # the solver's tolerance


def test_the_probe_learns_a_signal_and_nothing_from_noise() -> None:
    train, test = made(400, seed=0, noise=0.1), made(200, seed=1, noise=0.1)
    assert linear_probe(train, test).mAP > 0.9
    noise = [data._replace(features=torch.randn_like(data.features)) for data in (train, test)]
    prevalence = test.labels.float().mean().item()  # type: ignore[union-attr]
    assert linear_probe(*noise).mAP < prevalence + 0.15


def test_a_class_without_a_positive_in_the_test_set_is_left_out() -> None:
    train, test = made(200, seed=0), made(100, seed=1)
    labels = test.labels.clone()  # type: ignore[union-attr]
    labels[:, 0] = 0
    result = linear_probe(train, test._replace(labels=labels))
    assert result.num_classes == NUM_LABELS - 1
    assert result.average_precision[0].isnan()
    assert result.mAP == pytest.approx(result.average_precision[1:].mean().item())


def test_invalid_arguments_of_a_probe_are_refused() -> None:
    train, test = made(20, seed=0), made(10, seed=1)
    none = torch.zeros(20, NUM_LABELS, dtype=torch.int8)
    with pytest.raises(ValueError, match="training features have no labels"):
        linear_probe(train._replace(labels=None), test)
    with pytest.raises(ValueError, match="test features have no labels"):
        linear_probe(train, test._replace(labels=None))
    with pytest.raises(ValueError, match="width 24, but test features 20"):
        linear_probe(train, test._replace(features=test.features[:, :20]))
    with pytest.raises(ValueError, match="5 labels and test images 3"):
        linear_probe(train, test._replace(labels=none[:10, :3]))
    with pytest.raises(ValueError, match="training set is empty"):
        linear_probe(Features(torch.zeros(0, 24), none[:0], torch.arange(0)), test)
    with pytest.raises(ValueError, match="test features contain NaN"):
        linear_probe(train, test._replace(features=test.features / 0))
    with pytest.raises(ValueError, match="no label has a positive in the test set"):
        linear_probe(train, test._replace(labels=none[:10]))
    with pytest.raises(ValueError, match="no label has a positive in the 4 images held out"):
        linear_probe(train._replace(labels=none), test)
    with pytest.raises(ValueError, match=r"strengths .* must be one or more numbers"):
        linear_probe(train, test, strengths=())
    with pytest.raises(ValueError, match=r"strengths .* must be one or more numbers"):
        linear_probe(train, test, strengths=(-1.0, 1.0))
    for fraction in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"validation_fraction {fraction} must be between"):
            linear_probe(train, test, validation_fraction=fraction)
    one = Features(train.features[:1], train.labels[:1], torch.arange(1))  # type: ignore[index]
    with pytest.raises(ValueError, match="1 training image cannot be split"):
        linear_probe(one, test)
