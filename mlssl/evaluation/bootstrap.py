"""Bootstrap of the test images: intervals of mean average precision, and of the difference of two backbones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mlssl.bars import progress_bar
from mlssl.evaluation.metrics import average_precision, checked_targets, mean_average_precision

NUM_RESAMPLES = 1000


class Resampled(NamedTuple):
    """Average precision over resamples of the images."""

    means: Tensor
    """(R,) float64, mean average precision of each resample; NaN if no label has a positive and a negative."""
    class_intervals: Tensor
    """(L, 2) float64, bounds of the 95 % interval of each label's average precision; NaN for labels without one."""


def bootstrap_interval(
    scores: Tensor,
    targets: Tensor,
    *,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Confidence interval of the mean average precision over test images of the same kind.

    The percentile interval (B. Efron and R. Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13) over images
    sampled with replacement, all labels of an image together, minus the bootstrap's estimate of bias (ch. 10): a
    positive that is sampled twice retrieves itself, which raises the average precision of rare classes in every
    resample. The interval does not cover other training seeds. A class without a positive or without a negative in a
    resample is left out of its mean.

    Args:
        scores: (n, L), higher means more likely.
        targets: (n, L), bool or integer: 1 present, 0 absent, −1 unknown.
        num_resamples: Number of resamples of n images, at least 1.
        confidence: Fraction of the resamples inside, between 0 and 1.
        seed: Seed of the resamples.

    Returns:
        Lower and upper bound, in 0–1; NaN if no label has a positive and a negative.

    Raises:
        ValueError: If a number is out of its range, and as `mean_average_precision`.
        TypeError: If the targets are floats.
    """
    means = resample(scores, targets, num_resamples=num_resamples, seed=seed).means
    low, high = interval_of(means, mean_average_precision(scores, targets)[0], confidence)
    return low, high


def resample(
    scores: Tensor, targets: Tensor, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0, progress: bool = False
) -> Resampled:
    """Mean average precision of each resample of the images, and the interval of each label's average precision.

    The resamples depend only on `seed` and the number of images. So the difference of the means of two backbones is a
    paired bootstrap: the difficulty of a resample cancels.

    Args:
        scores: (n, L), higher means more likely.
        targets: (n, L), bool or integer: 1 present, 0 absent, −1 unknown.
        num_resamples: R, number of resamples of n images, at least 1.
        seed: Seed of the resamples.
        progress: Whether to show a bar with classes per second, once it has taken a second.

    Raises:
        ValueError: If `num_resamples` is below 1, and as `mean_average_precision`.
        TypeError: If the targets are floats.
    """
    if num_resamples < 1:
        raise ValueError(f"num_resamples={num_resamples} was given: pass at least 1, such as 1000")
    if scores.ndim != 2:
        raise ValueError(f"scores of shape {tuple(scores.shape)} have no label axis: pass (n, L)")
    targets = checked_targets(scores, targets).cpu()
    ranks = scores.double().cpu()
    counts = _resample_counts(len(scores), num_resamples, seed)
    total, classes = torch.zeros(num_resamples, dtype=torch.float64), torch.zeros(num_resamples)
    estimates = average_precision(scores, targets).cpu()
    intervals = torch.full((scores.shape[1], 2), torch.nan, dtype=torch.float64)
    labels = estimates.isfinite().nonzero().flatten().tolist()
    for label in progress_bar(labels, "bootstrap", delay=1, disable=not progress, unit=" classes"):
        known = (targets[:, label] >= 0).nonzero().flatten()
        positive = known[targets[known, label] == 1]
        # Average precision changes only at the scores of positives: count images between these, highest score first.
        thresholds = ranks[positive, label].unique(sorted=True)  # type: ignore[no-untyped-call]
        last = len(thresholds)
        hits, seen = (torch.zeros(last + 1, num_resamples) for _ in range(2))
        hits.index_add_(0, last - torch.searchsorted(thresholds, ranks[positive, label], right=True), counts[positive])
        seen.index_add_(0, last - torch.searchsorted(thresholds, ranks[known, label], right=True), counts[known])
        retrieved, retrieved_images = hits.cumsum(0), seen.cumsum(0)
        positives = retrieved[-1]
        precision = (hits * retrieved).div_(retrieved_images.clamp_(min=1)).sum(0) / positives.clamp(min=1)
        defined = (positives > 0) & (seen.sum(0) > positives)
        total += torch.where(defined, precision, 0.0)
        classes += defined
        intervals[label] = torch.tensor(interval_of(precision[defined], estimates[label].item()))
    return Resampled(torch.where(classes > 0, total / classes, torch.nan), intervals.clamp(0, 1))


def interval_of(resampled: Tensor, estimate: float, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile interval of resampled values (R,), minus the bootstrap's estimate of bias.

    Args:
        resampled: Means of `resample`, or a difference of two of them; NaN is left out.
        estimate: The same quantity on the original images.
        confidence: Fraction of the resamples inside, between 0 and 1.

    Returns:
        Lower and upper bound; NaN if every resample is NaN.

    Raises:
        ValueError: If the confidence is out of its range.

    Example:
        >>> interval_of(torch.arange(101.0), 50, confidence=0.5)
        (25.0, 75.0)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} was given: pass a number between 0 and 1, such as 0.95")
    values = resampled[~resampled.isnan()].double()
    if not len(values):
        return float("nan"), float("nan")
    tail = (1 - confidence) / 2
    ends = values.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)) - (values.mean() - estimate)
    low, high = ends.tolist()
    return low, high


def _resample_counts(num_images: int, num_resamples: int, seed: int) -> Tensor:
    """Number of times each image is in each resample, (n, R)."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(num_images, num_resamples)
    one = torch.ones(1)
    for resample in range(num_resamples if num_images else 0):
        sampled = torch.randint(num_images, (num_images,), generator=generator)
        counts[:, resample].scatter_add_(0, sampled, one.expand(num_images))
    return counts
