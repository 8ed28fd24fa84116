"""How far mean average precision would vary on other test images, and how far the difference of two backbones would."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mlssl.bars import progress_bar
from mlssl.evaluation.metrics import average_precision, checked_targets, mean_average_precision

NUM_RESAMPLES = 1000


class Resampled(NamedTuple):
    """What resamples of the images gave."""

    means: Tensor
    """(R,) float64, mean average precision of each; NaN where no label has a positive and a negative."""
    class_intervals: Tensor
    """(L, 2) float64, ends of the 95 % interval of each label's average precision; NaN for one that has none."""


def bootstrap_interval(
    scores: Tensor,
    targets: Tensor,
    *,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Confidence interval of the mean average precision: what other test images of the same kind might have given.

    The percentile interval (B. Efron and R. Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13) over images
    drawn with replacement, all labels of an image together, less the bootstrap's estimate of bias (ch. 10): a positive
    that is drawn twice retrieves itself, which lifts the average precision of rare classes in every draw. It says
    nothing of other seeds of a training. A class without a positive or without a negative among the drawn images is
    left out of the mean of that draw.

    Args:
        scores: (n, L), higher means more likely.
        targets: (n, L), bool or integer: 1 present, 0 absent, −1 unknown.
        num_resamples: How often n images are drawn, at least 1.
        confidence: Share of the resamples inside, between 0 and 1.
        seed: Of the draws.

    Returns:
        Lower and upper end, in 0–1; NaN where no label has a positive and a negative.

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
    """Mean average precision of each resample of the images, and how far the average precision of each label varies.

    The draws depend on `seed` and the number of images alone. So the difference of the means of two backbones is a
    paired bootstrap: what makes a resample hard for both cancels.

    Args:
        scores: (n, L), higher means more likely.
        targets: (n, L), bool or integer: 1 present, 0 absent, −1 unknown.
        num_resamples: R, how often n images are drawn, at least 1.
        seed: Of the draws.
        progress: Whether to show a bar with classes per second, once it has taken a second.

    Raises:
        ValueError: If `num_resamples` is below 1, and as `mean_average_precision`.
        TypeError: If the targets are floats.
    """
    if num_resamples < 1:
        raise ValueError(f"num_resamples={num_resamples} was given: pass a number of at least 1, such as 1000")
    if scores.ndim != 2:
        raise ValueError(f"scores of shape {tuple(scores.shape)} have no label axis: give (n, L)")
    targets = checked_targets(scores, targets).cpu()
    ranks = scores.double().cpu()
    times = _times_drawn(len(scores), num_resamples, seed)
    total, classes = torch.zeros(num_resamples, dtype=torch.float64), torch.zeros(num_resamples)
    estimates = average_precision(scores, targets).cpu()
    intervals = torch.full((scores.shape[1], 2), torch.nan, dtype=torch.float64)
    labels = estimates.isfinite().nonzero().flatten().tolist()
    for label in progress_bar(labels, "bootstrap", delay=1, disable=not progress, unit=" classes"):
        known = (targets[:, label] >= 0).nonzero().flatten()
        positive = known[targets[known, label] == 1]
        # Precision changes recall only at the scores of positives: images are counted between these, best first.
        thresholds = ranks[positive, label].unique(sorted=True)  # type: ignore[no-untyped-call]
        last = len(thresholds)
        found, seen = (torch.zeros(last + 1, num_resamples) for _ in range(2))
        found.index_add_(0, last - torch.searchsorted(thresholds, ranks[positive, label], right=True), times[positive])
        seen.index_add_(0, last - torch.searchsorted(thresholds, ranks[known, label], right=True), times[known])
        retrieved, among = found.cumsum(0), seen.cumsum(0)
        positives = retrieved[-1]
        precision = (found * retrieved).div_(among.clamp_(min=1)).sum(0) / positives.clamp(min=1)
        there = (positives > 0) & (seen.sum(0) > positives)
        total += torch.where(there, precision, 0.0)
        classes += there
        intervals[label] = torch.tensor(interval_of(precision[there], estimates[label].item()))
    return Resampled(torch.where(classes > 0, total / classes, torch.nan), intervals.clamp(0, 1))


def interval_of(resampled: Tensor, estimate: float, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile interval of resampled values (R,), less the bootstrap's estimate of bias.

    Args:
        resampled: Means of `resample`, or a difference of two of them; NaN is left out.
        estimate: The same quantity on the images themselves.
        confidence: Share of the resamples inside, between 0 and 1.

    Returns:
        Lower and upper end; NaN where every resample is NaN.

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


def _times_drawn(num_images: int, num_resamples: int, seed: int) -> Tensor:
    """How often each image is drawn in each resample, (n, R)."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.zeros(num_images, num_resamples)
    one = torch.ones(1)
    for resample in range(num_resamples if num_images else 0):
        drawn = torch.randint(num_images, (num_images,), generator=generator)
        times[:, resample].scatter_add_(0, drawn, one.expand(num_images))
    return times
