"""Calibrate logits on held-out images, and choose each label's threshold with its uncertainty."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NEVER = 1.0
"""Threshold of a label that is never predicted: a label is predicted if its probability is above the threshold."""

RESAMPLES = 100
"""Number of resamples of the held-out images, for the threshold and its interval."""

RESAMPLED_NUMBERS = 2e8
"""Maximum number of scores read by all resamples; large sets get, and need, fewer resamples."""

CONFIDENCE = 0.9
"""Fraction of the resampled thresholds inside the interval."""


class Thresholds(NamedTuple):
    """For each label, (L,): the threshold, its interval, and its number of positive held-out images."""

    values: Tensor
    low: Tensor
    high: Tensor
    positives: Tensor


def choose_thresholds(
    probabilities: Tensor, targets: Tensor, *, precision: float | None = None, seed: int = 0
) -> Thresholds:
    """The threshold of each label with the best F1 on held-out images, or the lowest that reaches a precision there.

    Images are sampled with replacement many times, a threshold is chosen in each resample, and the median is used
    (bagging, L. Breiman 1996): the best threshold of a label with few positives depends on single images, and the
    median less so. The interval contains 90 % of them. For a target precision the threshold is that of the original
    images.

    Args:
        probabilities: (n, L), in 0–1.
        targets: (n, L) of 1, 0 and −1; −1 is left out of the label.
        precision: Target precision of the predicted labels, in 0–1; None: the best F1.
        seed: Seed of the resamples.

    Returns:
        Thresholds in 0–1; `NEVER` for a label without a positive, or if its precision is not reached.

    Raises:
        ValueError: If `precision` is not between 0 and 1.
    """
    check_precision(precision)
    order = probabilities.argsort(dim=0, descending=True, stable=True)
    ranked = probabilities.gather(0, order)
    positive, known = ((values.gather(0, order)).float() for values in (targets == 1, targets >= 0))
    below = F.pad(ranked[1:], (0, 0, 0, 1))
    cuts = (ranked + below) / 2
    tied = ranked == below  # images with equal probabilities get the label together
    chosen = _cut(cuts, tied, positive, known, None, precision)
    count = len(probabilities)
    number = int(max(20, min(RESAMPLES, RESAMPLED_NUMBERS // max(probabilities.numel(), 1))))
    generator = torch.Generator().manual_seed(seed)
    sampled = []
    for _ in range(number):
        counts = torch.bincount(torch.randint(count, (count,), generator=generator), minlength=count).float()
        sampled.append(_cut(cuts, tied, positive, known, counts[order], precision))
    resamples = torch.stack(sampled)
    low, middle, high = resamples.quantile(torch.tensor([(1 - CONFIDENCE) / 2, 0.5, (1 + CONFIDENCE) / 2]), dim=0)
    values = chosen if precision is not None else torch.where(chosen < NEVER, middle.clamp(max=ranked[0]), chosen)
    return Thresholds(values, low, high, (targets == 1).sum(0))


def check_precision(precision: float | None) -> None:
    """Refuse an invalid precision.

    Raises:
        ValueError: If it is neither None nor above 0 and at most 1.
    """
    if precision is not None and not 0 < precision <= 1:
        raise ValueError(f"precision={precision} was given: pass a fraction above 0 and at most 1, such as 0.8")


def _cut(
    cuts: Tensor, tied: Tensor, positive: Tensor, known: Tensor, counts: Tensor | None, precision: float | None
) -> Tensor:
    """The best of the cuts (n, L) between ranked images, each counted `times`."""
    if counts is not None:
        positive, known = positive * counts, known * counts
    right, given = positive.cumsum(0), known.cumsum(0)
    total = right[-1]
    # For a target precision, the cut with the most images, that is, the lowest.
    f1 = 2 * right / (given + total).clamp(min=1)
    quality = f1 if precision is None else given * (right >= precision * given)
    quality = quality.masked_fill(tied, -1)
    best = quality.max(0)
    return torch.where(best.values > 0, cuts.gather(0, best.indices[None])[0], NEVER).where(total > 0, NEVER)


class Calibration(NamedTuple):
    """Probability = sigmoid(slope · logit + shift), one pair for all labels (J. Platt 1999)."""

    slope: float
    shift: float

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits to probabilities of the same shape."""
        return (self.slope * logits + self.shift).sigmoid()


def calibrate(logits: Tensor, targets: Tensor, *, iterations: int = 50) -> Calibration:
    """Slope and shift that minimise the log-loss on held-out images, by Newton's method.

    One pair for all labels, because rare labels have too few positives for separate pairs. Without a known positive or
    a known negative there is nothing to fit, and logits are not changed.

    Args:
        logits: (n, L).
        targets: (n, L) of 1, 0 and −1; −1 is left out.
        iterations: Maximum number.
    """
    known = targets >= 0
    inputs, labels = logits[known].double(), (targets[known] == 1).double()
    positives = labels.sum()
    negatives = len(labels) - positives
    if not (positives and negatives):
        return Calibration(1.0, 0.0)
    # Platt's targets (sec. 2.2) keep the slope finite for perfectly separated labels.
    labels = torch.where(labels == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    columns = torch.stack([inputs, torch.ones_like(inputs)], dim=1)
    solution = torch.tensor([1.0, 0.0], dtype=torch.float64)
    loss = _log_loss(columns @ solution, labels)
    for _ in range(iterations):
        probability = (columns @ solution).sigmoid()
        gradient = columns.T @ (probability - labels) / len(labels)
        curvature = (columns * (probability * (1 - probability))[:, None]).T @ columns / len(labels)
        step = torch.linalg.solve(curvature + 1e-9 * torch.eye(2, dtype=torch.float64), gradient)
        size = 1.0
        while size > 1e-4 and _log_loss(columns @ (solution - size * step), labels) > loss:
            size /= 2
        solution = solution - size * step
        before, loss = loss, _log_loss(columns @ solution, labels)
        if before - loss < 1e-10:
            break
    slope, shift = solution.tolist()
    return (
        Calibration(slope, shift) if slope > 0 else Calibration(1.0, 0.0)
    )  # discard a fit that would reverse the order


def _log_loss(logits: Tensor, labels: Tensor) -> float:
    return F.binary_cross_entropy_with_logits(logits, labels).item()
