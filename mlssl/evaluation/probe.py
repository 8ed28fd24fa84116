"""Linear probe on frozen features, for all labels and regularisation strengths, by one convex solver."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlssl.bars import progress_bar
from mlssl.choices import PositiveWeight
from mlssl.evaluation.bootstrap import bootstrap_interval
from mlssl.evaluation.features import Features
from mlssl.evaluation.logistic import StandardisedRows, logistic_regression
from mlssl.evaluation.metrics import average_precision, mean_average_precision

STRENGTHS = tuple(10 ** (k / 2) for k in range(-8, 3))
"""1e-4 to 10 in steps of √10: for a few thousand images, from almost no shrinkage to weights near 0."""


@dataclass(frozen=True)
class LinearProbeResult:
    """Result of a linear probe.

    Attributes:
        mAP: Mean average precision on the test set, 0–1.
        interval: 95 % confidence interval of mAP by bootstrap over the test images; NaN without resamples.
        average_precision: (L,) of the test set; NaN for a label without a positive in it.
        num_classes: Labels with a positive in the test set, over which mAP is the mean.
        num_learned: Labels with a positive and a negative in the training set; the others score all images equally.
        strength: The chosen λ of ½·λ·‖w‖², added to the mean log-loss of a label.
        validation: Strength → mAP on the held-out part of the training set, used to choose it.
        scores: (n, L) logits of the test set; their sigmoid is the probability.
    """

    mAP: float  # noqa: N815 - the field's spelling
    interval: tuple[float, float]
    average_precision: Tensor
    num_classes: int
    num_learned: int
    strength: float
    validation: dict[float, float]
    scores: Tensor


def linear_probe(
    train: Features,
    test: Features,
    *,
    validation_fraction: float = 0.2,
    strengths: Sequence[float] = STRENGTHS,
    pos_weight: PositiveWeight = 1.0,
    num_resamples: int = 1000,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> LinearProbeResult:
    """L2-regularised logistic regression for each label, on standardised features; nothing is chosen on the test set.

    The strength with the best mAP on a random held-out part of the training set is chosen, and the classifier is then
    refitted on the whole training set. Features are standardised by the training set's mean and standard deviation.
    Memory-mapped features are read in pieces and never copied as a whole, so that about two gigabytes of additional
    memory are needed, regardless of the number of images.

    A label without both a positive and a negative in the training set cannot be learned: its score is the same for all
    images, so its average precision on the test set is the fraction of positives there.

    Args:
        train: Labelled features, n >= 2.
        test: Labelled features of the same widths D and L.
        validation_fraction: Held-out fraction of the training set, between 0 and 1.
        strengths: Values of λ >= 0 to choose from; ½·λ·‖w‖² is added to the mean log-loss of a label; scikit-learn's C
            is 1 / (λ · number of images). A single one is used without a choice.
        pos_weight: Weight > 0 of a positive; a negative has 1; "balanced" gives all positives of a label the weight
            of all its negatives.
        num_resamples: Resamples of the bootstrap for the interval; 0 for none.
        seed: Seed of the random split and of the bootstrap.
        device: Device to compute on; None takes a GPU if there is one.
        progress: Whether to show bars with classes per second, once they have taken a second.

    Returns:
        Test mAP, average precisions and logits, and how the strength was chosen.

    Raises:
        ValueError: If labels are missing, widths differ, a set is empty or has NaN, no label has a positive in the
            test set or the held-out part, or an argument is outside its range.
    """
    train_labels, test_labels = check_sets(train, test)
    if not strengths or min(strengths) < 0:
        raise ValueError(f"strengths {tuple(strengths)} must be one or more numbers >= 0, such as (0.01, 0.1, 1.0)")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen, validation = strengths[0], dict[float, float]()
    if len(strengths) > 1:
        fit, held_out = _split(len(train_labels), validation_fraction, seed)
        if not (train_labels[held_out] == 1).any():
            raise ValueError(
                f"no label has a positive in the {len(held_out)} images held out to choose the strength: "
                "pass a larger validation_fraction, or one strength"
            )
        ordered = sorted(strengths, reverse=True)
        standardised = StandardisedRows(train.features, fit, device=device)
        precision = torch.cat(
            [
                torch.stack([average_precision(logits, train_labels[held_out][:, labels]) for logits in by_strength])
                for labels, by_strength in _fitted(
                    standardised, train_labels[fit], ordered, pos_weight, train.features, held_out, progress
                )
            ],
            dim=1,
        )
        validation = dict(zip(ordered, precision.nanmean(1).tolist(), strict=True))
        chosen = max(validation, key=lambda strength: validation[strength])
    standardised = StandardisedRows(train.features, device=device)
    logits = torch.cat(
        [
            only
            for _, (only,) in _fitted(standardised, train_labels, [chosen], pos_weight, test.features, None, progress)
        ],
        dim=1,
    )
    mean, count = mean_average_precision(logits, test_labels)
    interval = (float("nan"), float("nan"))
    if num_resamples:
        interval = bootstrap_interval(logits, test_labels, num_resamples=num_resamples, seed=seed)
    return LinearProbeResult(
        mean,
        interval,
        average_precision(logits, test_labels),
        count,
        num_learnable(train_labels),
        chosen,
        validation,
        logits,
    )


def num_learnable(labels: Tensor) -> int:
    """Labels (n, L) → number of labels with both a positive and a negative image."""
    return int(((labels == 1).any(0) & (labels == 0).any(0)).sum())


def check_sets(train: Features, test: Features) -> tuple[Tensor, Tensor]:
    """Check a training and a test set, and return their labels.

    Raises:
        ValueError: If labels are missing, widths differ, a set is empty or has NaN, or no label has a positive in the
            test set.
    """
    train_labels, test_labels = _checked_labels(train, "training"), _checked_labels(test, "test")
    if train.features.shape[1] != test.features.shape[1]:
        raise ValueError(
            f"training features have width {train.features.shape[1]}, but test features {test.features.shape[1]}: "
            "extract both with one backbone and one pooling"
        )
    if train_labels.shape[1] != test_labels.shape[1]:
        raise ValueError(
            f"training images have {train_labels.shape[1]} labels and test images {test_labels.shape[1]}: "
            "pass both with the same classes in the same order"
        )
    if not (test_labels == 1).any():
        raise ValueError("no label has a positive in the test set, so there is no mAP: check its labels")
    return train_labels, test_labels


def _fitted(
    standardised: StandardisedRows,
    labels: Tensor,
    strengths: Sequence[float],
    pos_weight: PositiveWeight,
    others: Tensor,
    rows: Tensor | None,
    progress: bool,
) -> Iterator[tuple[slice, Tensor]]:
    """Fit on `standardised` and yield, for groups of labels, their columns and the logits (S, n, l) of other features.

    The size of a group is limited by the memory for its logits and their change in a step.
    """
    size = max(1, standardised.columns_at_once // len(strengths))
    name = "probe, strengths" if len(strengths) > 1 else "probe"
    with progress_bar(total=labels.shape[1], desc=name, delay=1, disable=not progress, unit=" classes") as bar:
        for start in range(0, labels.shape[1], size):
            columns = slice(start, min(start + size, labels.shape[1]))
            solution = logistic_regression(standardised, labels[:, columns], strengths, pos_weight=pos_weight)
            yield columns, solution.logits(others, rows)
            bar.update(columns.stop - start)


def _split(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Images to fit on and images to hold out, both in ascending order, which reads a file fastest."""
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction {fraction} must be between 0 and 1, such as 0.2")
    if count < 2:
        raise ValueError(
            f"{count} training image cannot be split to choose a strength: pass two or more, or one strength"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_out = min(max(round(count * fraction), 1), count - 1)
    return order[held_out:].sort().values, order[:held_out].sort().values


def _checked_labels(features: Features, name: str) -> Tensor:
    if features.labels is None:
        raise ValueError(f"the {name} features have no labels: a linear probe needs a labelled set")
    if len(features.features) == 0:
        raise ValueError(f"the {name} set is empty: check its split")
    if not all(piece.isfinite().all() for piece in torch.split(features.features, 2**14)):
        raise ValueError(
            f"the {name} features contain NaN or infinity: check the backbone's weights and its input images"
        )
    return features.labels
