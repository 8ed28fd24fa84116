"""Multi-label metrics in plain torch: average precision with ties, and its mean over classes."""

from __future__ import annotations

import torch
from torch import Tensor


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Non-interpolated average precision of each label: the sum over thresholds of (recall gained) × precision.

    Images with equal scores share one threshold, so the order of the images does not matter; the result is that of
    `sklearn.metrics.average_precision_score` on the images whose target is known.

    Args:
        scores: (n, L) or (n,), any real numbers, higher means more likely; infinities are fine.
        targets: same shape, bool or integer: 1 present, 0 absent, −1 unknown (the image is left out for that label).

    Returns:
        (L,) or scalar, float64, in 0–1; NaN for a label without a positive (n = 0 included).

    Raises:
        ValueError: If the shapes differ, a score is NaN or a target is none of 1, 0, −1.
        TypeError: If the targets are floats.

    Example:
        >>> average_precision(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([1, 0, 1])).item()
        0.8333333333333333
    """
    if scores.shape != targets.shape or scores.ndim not in (1, 2):
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} and targets of shape {tuple(targets.shape)} do not fit: "
            "give both as (n, L), or both as (n,) for one label"
        )
    if targets.is_floating_point() or targets.is_complex():
        raise TypeError(
            f"targets of {targets.dtype} are ambiguous: give bool or integers, 1 present, 0 absent, -1 unknown"
        )
    if scores.ndim == 1:
        return average_precision(scores[:, None], targets[:, None])[0]
    if len(scores) == 0:
        return scores.new_full((scores.shape[1],), torch.nan, dtype=torch.float64)
    targets = targets.to(torch.int8)
    if ((targets < -1) | (targets > 1)).any():
        raise ValueError("targets hold values other than 1 (present), 0 (absent) and -1 (unknown): recode them first")
    if scores.isnan().any():
        raise ValueError("scores hold NaN, which has no rank: look for the NaN in the features or the model first")

    scores = scores.double()
    order = scores.argsort(dim=0, descending=True)
    scores, targets = scores.gather(0, order), targets.gather(0, order)
    positive = targets == 1
    found = positive.cumsum(0)
    precision = found.double() / (targets >= 0).cumsum(0).clamp(min=1)
    # Every image of a tie is retrieved at once: it takes the precision at the last image of its tie.
    place = torch.arange(len(scores), device=scores.device)[:, None].expand_as(scores)
    ends = torch.ones_like(positive)
    ends[:-1] = scores[:-1] != scores[1:]
    tie_end = torch.where(ends, place, len(scores) - 1).flip(0).cummin(0).values.flip(0)
    return (precision.gather(0, tie_end) * positive).sum(0) / found[-1]


def mean_average_precision(scores: Tensor, targets: Tensor) -> tuple[float, int]:
    """Mean over the labels of `average_precision`; a label without a positive is left out.

    Args:
        scores: (n, L), higher means more likely.
        targets: (n, L), bool or integer: 1 present, 0 absent, −1 unknown.

    Returns:
        mAP in 0–1 and the number of labels in the mean; (NaN, 0) where no label has a positive.

    Raises:
        ValueError: If the arguments are not (n, L), or as in `average_precision`.
        TypeError: If the targets are floats.

    Example:
        >>> mean_average_precision(torch.tensor([[0.9, 0.1], [0.2, 0.4]]), torch.tensor([[1, 0], [0, 0]]))
        (1.0, 1)
    """
    if scores.ndim != 2:
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} have no label axis: give (n, L), or use average_precision"
        )
    per_class = average_precision(scores, targets)
    counted = per_class.isfinite()
    return per_class.nanmean().item(), int(counted.sum())
