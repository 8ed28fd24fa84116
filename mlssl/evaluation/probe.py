"""Linear probe on frozen features: every label and every regularisation strength by one convex solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mlssl.evaluation.features import Features
from mlssl.evaluation.metrics import average_precision, mean_average_precision

STRENGTHS = tuple(10 ** (k / 2) for k in range(-8, 3))
"""1e-4 to 10 in steps of √10: on a few thousand images from hardly any shrinkage to weights near 0."""


@dataclass(frozen=True)
class LinearProbeResult:
    """What a linear probe found.

    Attributes:
        mAP: Mean average precision on the test set, 0–1.
        average_precision: (L,) of the test set; NaN for a label without a positive there.
        num_classes: Labels with a positive in the test set, those that mAP is the mean of.
        strength: The one chosen, λ of ½·λ·‖w‖² beside the mean log-loss of a label.
        validation: Strength → mAP on the held-out part of the training set, from which the choice was made.
        scores: (n, L) logits of the test set; their sigmoid is the probability.
    """

    mAP: float  # noqa: N815 - the field's spelling
    average_precision: Tensor
    num_classes: int
    strength: float
    validation: dict[float, float]
    scores: Tensor


def linear_probe(
    train: Features,
    test: Features,
    *,
    validation_fraction: float = 0.2,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> LinearProbeResult:
    """L2-regularised logistic regression for each label, on standardised features; the test set chooses nothing.

    A random part of the training set is held out, the strength with the best mAP there is taken, and the classifier is
    then fitted again on the whole training set. Features are standardised by the training set's mean and deviation.

    A label without both a positive and a negative in the training set cannot be learned: its score is the same for all
    images, so its average precision on the test set is the share of positives there.

    Args:
        train: Labelled features, n >= 2.
        test: Labelled features of the same widths D and L.
        validation_fraction: Of the training set, between 0 and 1; the default is a fifth.
        strengths: Values of λ >= 0 to choose from, for ½·λ·‖w‖² beside the mean log-loss of a label; scikit-learn's C
            is 1 / (λ · number of images). A single one is used as it is.
        seed: Of the random split.

    Returns:
        Test mAP, average precisions and logits, and how the strength was chosen.

    Raises:
        ValueError: If labels are missing, widths differ, a set is empty or holds NaN, no label has a positive in the
            test set or the held-out part, or an argument is outside its range.
    """
    train_labels, test_labels = _checked_labels(train, "training"), _checked_labels(test, "test")
    if train.features.shape[1] != test.features.shape[1]:
        raise ValueError(
            f"training features are {train.features.shape[1]} wide and test features {test.features.shape[1]}: "
            "extract both with one backbone and one pooling"
        )
    if train_labels.shape[1] != test_labels.shape[1]:
        raise ValueError(
            f"training images have {train_labels.shape[1]} labels and test images {test_labels.shape[1]}: "
            "give both the same classes in the same order"
        )
    if not strengths or min(strengths) < 0:
        raise ValueError(f"strengths {tuple(strengths)} must be one or more numbers >= 0, such as (0.01, 0.1, 1.0)")
    if not (test_labels == 1).any():
        raise ValueError("no label has a positive in the test set, so there is no mAP: check its labels")

    chosen, validation = strengths[0], dict[float, float]()
    if len(strengths) > 1:
        fit, held = _split(len(train_labels), validation_fraction, seed)
        if not (train_labels[held] == 1).any():
            raise ValueError(
                f"no label has a positive among the {len(held)} images held out to choose the strength: "
                "give a larger validation_fraction, or one strength"
            )
        fits = _fit_and_score(
            train.features[fit], train_labels[fit], train.features[held], sorted(strengths, reverse=True)
        )
        validation = {strength: mean_average_precision(logits, train_labels[held])[0] for strength, logits in fits}
        chosen = max(validation, key=lambda strength: validation[strength])
    ((_, logits),) = _fit_and_score(train.features, train_labels, test.features, [chosen])
    mean, count = mean_average_precision(logits, test_labels)
    return LinearProbeResult(mean, average_precision(logits, test_labels), count, chosen, validation, logits)


def logistic_regression(
    features: Tensor, labels: Tensor, strengths: Sequence[float], *, max_iterations: int = 500, tolerance: float = 1e-5
) -> list[tuple[Tensor, Tensor]]:
    """Minimise, for each label and strength λ, mean log-loss + ½·λ·‖w‖² by preconditioned conjugate gradients.

    All labels advance together. The features are rotated to their principal axes, where the Hessian of a label is close
    to diagonal: (mean of p·(1−p)) · variance + λ. The steps along the conjugate directions (Polak–Ribière, restarted
    where they stop descending) are exact. Each strength starts from the weights of the one before, so give the
    strongest first.

    Args:
        features: (n, D), roughly standardised.
        labels: (n, L) of 1, 0 and −1; −1 is left out of the label's mean.
        strengths: λ >= 0, one solution each.
        max_iterations: For one strength; a solution that needs more is returned as it stands.
        tolerance: A label is done when its Newton decrement, about twice what the objective can still fall, is below
            `tolerance` times 1e-2 of the objective.

    Returns:
        A pair (weights (D, L), bias (L,)) for each strength; both 0 for a label without both a positive and a negative.
    """
    known, targets = (labels >= 0).float(), (labels == 1).float()
    positives, count = targets.sum(0), known.sum(0)
    learnable = (positives > 0) & (positives < count)
    share = known * learnable / count.clamp(min=1)  # of each image in the mean over a label's images
    variance, axes = torch.linalg.eigh((features.double().T @ features.double()) / len(features))
    inputs = F.pad(features @ axes.float(), (0, 1), value=1.0)  # the last column carries the bias
    variance = F.pad(variance.clamp(min=0).float(), (0, 1), value=1.0)[:, None]

    weights = inputs.new_zeros(inputs.shape[1], labels.shape[1])
    weights[-1, learnable] = (positives / count).logit()[learnable]
    solutions = []
    for strength in strengths:
        penalty = inputs.new_full((inputs.shape[1], 1), strength)
        penalty[-1] = 0
        weights = _descend(inputs, targets, share, penalty, variance, weights, max_iterations, tolerance * 1e-2)
        solutions.append((axes.float() @ weights[:-1], weights[-1]))
    return solutions


def _descend(
    inputs: Tensor,
    targets: Tensor,
    share: Tensor,
    penalty: Tensor,
    variance: Tensor,
    weights: Tensor,
    max_iterations: int,
    tolerance: float,
) -> Tensor:
    logits = inputs @ weights
    old_scaled = direction = torch.zeros_like(weights)
    old_decrement = torch.ones_like(weights[0])
    for _ in range(max_iterations):
        probability = logits.sigmoid()
        gradient = inputs.T @ (share * (probability - targets)) + penalty * weights
        spread = (share * probability * (1 - probability)).sum(0)
        scaled = gradient / (spread * variance + penalty).clamp(min=1e-8)
        decrement = (gradient * scaled).sum(0)
        objective = (share * (F.softplus(logits) - targets * logits)).sum(0) + 0.5 * (penalty * weights**2).sum(0)
        if (decrement <= tolerance * objective).all():
            break
        momentum = ((decrement - (gradient * old_scaled).sum(0)) / old_decrement.clamp(min=1e-30)).clamp(min=0)
        direction = momentum * direction - scaled
        uphill = (direction * gradient).sum(0) >= 0
        direction = torch.where(uphill, -scaled, direction)
        change = inputs @ direction
        step = _line_search(
            logits, change, targets, share, (penalty * weights * direction).sum(0), (penalty * direction**2).sum(0)
        )
        weights = weights + step * direction
        logits = logits + step * change
        old_scaled, old_decrement = scaled, decrement
    return weights


def _line_search(
    logits: Tensor, change: Tensor, targets: Tensor, share: Tensor, slope: Tensor, curvature: Tensor, steps: int = 8
) -> Tensor:
    # Newton's method on the derivative along the direction, which rises; bisection where Newton leaves the bracket.
    low, high = torch.zeros_like(slope), torch.full_like(slope, torch.inf)
    step = low
    for _ in range(steps):
        probability = (logits + step * change).sigmoid()
        first = (share * (probability - targets) * change).sum(0) + slope + step * curvature
        second = (share * probability * (1 - probability) * change**2).sum(0) + curvature
        low, high = torch.where(first <= 0, step, low), torch.where(first > 0, step, high)
        newton = step - first / second.clamp(min=1e-30)
        newton = torch.minimum(newton, 4 * low + 4)
        step = torch.where(
            (newton > low) & (newton < high) | (first == 0), newton, (low + high.clamp(max=4 * low + 4)) / 2
        )
    return step


def _fit_and_score(
    train: Tensor, labels: Tensor, test: Tensor, strengths: Sequence[float]
) -> list[tuple[float, Tensor]]:
    mean, deviation = train.mean(0), train.std(0, correction=0)
    # A feature that is constant in training says nothing, whatever it does in the test set.
    scale = torch.where(deviation > 1e-6 * (mean.abs() + 1e-12), 1 / deviation, torch.zeros_like(deviation))
    solutions = logistic_regression((train - mean) * scale, labels, strengths)
    test = (test - mean) * scale
    return [(strength, test @ weights + bias) for strength, (weights, bias) in zip(strengths, solutions, strict=True)]


def _split(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction {fraction} must lie between 0 and 1, such as 0.2")
    if count < 2:
        raise ValueError(
            f"{count} training image cannot be split to choose a strength: give two or more, or one strength"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = min(max(round(count * fraction), 1), count - 1)
    return order[held:], order[:held]


def _checked_labels(features: Features, name: str) -> Tensor:
    if features.labels is None:
        raise ValueError(f"the {name} features have no labels: a linear probe needs a labelled set")
    if len(features.features) == 0:
        raise ValueError(f"the {name} set is empty: check its split")
    if not features.features.isfinite().all():
        raise ValueError(
            f"the {name} features hold NaN or infinity: look at the backbone's weights and its input images"
        )
    return features.labels
