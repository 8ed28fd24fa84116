"""Multi-label metrics: average precision, precision, recall and F1, as functions and as torchmetrics' `Metric`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

THRESHOLD = 0.5
"""Probability from which a label counts as predicted, as in ML-GCN (arXiv 1904.03582)."""

RANKED_NUMBERS = 2**22
"""Scores that are ranked at a time."""

TOP_K = 3
"""Labels per image in the second set of scores, as in the field since J. Wang et al., arXiv 1604.04573."""


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Non-interpolated average precision of each label: the sum over thresholds of (recall gained) × precision.

    Images with equal scores share one threshold, so the order of the images does not matter; the result is that of
    `sklearn.metrics.average_precision_score` on the images whose target is known. A label that no image is known to
    lack has none: any scores would rank it perfectly.

    Args:
        scores: (n, L) or (n,), any real numbers, higher means more likely; infinities are fine.
        targets: same shape, bool or integer: 1 present, 0 absent, −1 unknown (the image is left out for that label).

    Returns:
        (L,) or scalar, float64, in 0–1; NaN for a label without a positive or without a negative (n = 0 included).

    Raises:
        ValueError: If the shapes differ, a score is NaN or a target is none of 1, 0, −1.
        TypeError: If the targets are floats.

    Example:
        >>> average_precision(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([1, 0, 1])).item()
        0.8333333333333333
    """
    if scores.ndim == 1 and targets.ndim == 1:
        return average_precision(scores[:, None], targets[:, None])[0]
    targets = checked_targets(scores, targets)
    if len(scores) == 0:
        return scores.new_full((scores.shape[1],), torch.nan, dtype=torch.float64)

    # A group of labels at a time: the working memory is a dozen times that of their scores.
    size = max(1, RANKED_NUMBERS // len(scores))
    groups = [slice(start, start + size) for start in range(0, scores.shape[1], size)]
    return torch.cat([_average_precision(scores[:, group], targets[:, group]) for group in groups])


def mean_average_precision(scores: Tensor, targets: Tensor) -> tuple[float, int]:
    """Mean over the labels of `average_precision`; a label without a positive or without a negative is left out.

    Args:
        scores: (n, L), higher means more likely.
        targets: (n, L), bool or integer: 1 present, 0 absent, −1 unknown.

    Returns:
        mAP in 0–1 and the number of labels in the mean; (NaN, 0) where no label has a positive and a negative.

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


def multilabel_scores(
    probabilities: Tensor, targets: Tensor, *, threshold: float = THRESHOLD, top_k: int = TOP_K
) -> dict[str, float]:
    """The scores that multi-label papers report, as Z.-M. Chen et al. define them (ML-GCN, arXiv 1904.03582, sec. 4.1).

    A label is predicted where its probability is at least the threshold. OP and OR pool the labels of all classes and
    images: right predictions ÷ predictions, and ÷ present labels. CP and CR are means of each class's precision and
    recall. OF1 and CF1 are the harmonic means of the two, so CF1 is not the mean of the classes' F1. `OP@3` and so on
    take the same of the 3 most probable known labels of each image, where these reach the threshold too; of equally
    probable ones the first columns come first. Unknown labels are left out of everything.

    Args:
        probabilities: (n, L) in 0–1; a sigmoid's, not logits.
        targets: (n, L), bool or integer: 1 present, 0 absent, −1 unknown.
        threshold: In 0–1, one for all classes.
        top_k: At least 1; more than L is all.

    Returns:
        Fractions "mAP", "OP", "OR", "OF1", "CP", "CR", "CF1", "OP@3", "OR@3", "OF1@3", "CP@3", "CR@3", "CF1@3" (with
        `top_k` behind the @), and "classes", the number of classes with a positive and a negative: mAP, CP and CR
        are means over these, and NaN where there is none. The precision of a class that is never predicted is 0, as
        are OP and OR without a prediction or a present label, and the harmonic mean of two zeros.

    Raises:
        ValueError: If the shapes differ or are not (n, L), or a value is out of range or NaN.
        TypeError: If the targets are floats.

    Example:
        >>> scores = multilabel_scores(torch.tensor([[0.9, 0.6], [0.2, 0.7]]), torch.tensor([[1, 0], [0, 1]]))
        >>> scores["OP"], scores["OR"], scores["CP"], scores["mAP"]
        (0.6666666666666666, 1.0, 0.75, 1.0)
    """
    _check_settings(threshold, top_k)
    if probabilities.ndim != 2:
        raise ValueError(f"probabilities of shape {tuple(probabilities.shape)} were given: pass (n, L)")
    targets = checked_targets(probabilities, targets)
    if ((probabilities < 0) | (probabilities > 1)).any():
        raise ValueError(
            f"probabilities lie between {probabilities.min():g} and {probabilities.max():g}, expected 0 to 1: "
            "take the sigmoid of logits first"
        )
    mean, classes = mean_average_precision(probabilities, targets)
    known = targets >= 0
    predicted = (probabilities >= threshold) & known
    ranked = torch.where(known, probabilities, -1.0).argsort(dim=1, descending=True, stable=True)
    among_first = torch.zeros_like(known).scatter(1, ranked[:, :top_k], True)
    scores = _precision_and_recall(predicted, targets, "")
    scores |= _precision_and_recall(predicted & among_first, targets, f"@{top_k}")
    return {"mAP": mean, **scores, "classes": classes}


class _ByImage(Metric):
    """Keeps probabilities, targets and ids of all images, over all processes; an id that comes twice counts once."""

    full_state_update = False
    probabilities: list[Tensor]
    targets: list[Tensor]
    image_ids: list[Tensor]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name in ("probabilities", "targets", "image_ids"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, probabilities: Tensor, targets: Tensor, image_ids: Tensor) -> None:
        """Add a batch.

        Args:
            probabilities: (B, L) in 0–1.
            targets: (B, L), bool or integer: 1 present, 0 absent, −1 unknown.
            image_ids: (B,), by which an image that a distributed sampler repeats is known.

        Raises:
            ValueError: If the shapes do not fit or a target is none of 1, 0, −1.
            TypeError: If the targets are floats.
        """
        targets = checked_targets(probabilities, targets)
        if image_ids.shape != probabilities.shape[:1]:
            raise ValueError(
                f"image_ids of shape {tuple(image_ids.shape)} were given for {len(probabilities)} images: one id each"
            )
        self.probabilities.append(probabilities.detach().float())
        self.targets.append(targets)
        self.image_ids.append(image_ids)

    def _once(self) -> tuple[Tensor, Tensor]:
        """Probabilities and targets of each image, on the CPU, because not every device sorts in float64."""
        once = first_places(dim_zero_cat(self.image_ids))
        return dim_zero_cat(self.probabilities)[once].cpu(), dim_zero_cat(self.targets)[once].cpu()


class MultiLabelScores(_ByImage):
    """`multilabel_scores` of a whole set that comes in batches, on one process or several.

    `update(probabilities, targets, image_ids)`; `compute()` gives the dictionary of `multilabel_scores` as scalar
    tensors. The result is that of one process: images are gathered and those of one id counted once.

    Args:
        threshold: Probability in 0–1 from which a label counts as predicted.
        top_k: At least 1.
        **settings: Of `torchmetrics.Metric`.

    Raises:
        ValueError: If a setting is out of range, and as `multilabel_scores`.
        TypeError: If targets are floats.

    Example:
        >>> metric = MultiLabelScores()
        >>> metric.update(torch.tensor([[0.9, 0.6]]), torch.tensor([[1, 0]]), torch.tensor([7]))
        >>> metric.update(torch.tensor([[0.9, 0.6]]), torch.tensor([[1, 0]]), torch.tensor([7]))  # the padding
        >>> metric.compute()["OP"]
        tensor(0.5000)
    """

    def __init__(self, *, threshold: float = THRESHOLD, top_k: int = TOP_K, **settings: Any) -> None:
        super().__init__(**settings)
        _check_settings(threshold, top_k)
        self.threshold = threshold
        self.top_k = top_k

    def compute(self) -> dict[str, Tensor]:
        """Every score as a scalar tensor."""
        scores = multilabel_scores(*self._once(), threshold=self.threshold, top_k=self.top_k)
        return {name: torch.tensor(float(value), device=self.device) for name, value in scores.items()}


class MultiLabelAveragePrecision(_ByImage):
    """`average_precision` of each class for a whole set that comes in batches, on one process or several.

    `update(probabilities, targets, image_ids)`, where any scores will do; `compute()` gives (L,) float32, NaN for a
    class without a positive or a negative. Images are gathered and those of one id counted once.

    Example:
        >>> metric = MultiLabelAveragePrecision()
        >>> metric.update(torch.tensor([[0.9, 0.6]]), torch.tensor([[1, 0]]), torch.tensor([7]))
        >>> metric.update(torch.tensor([[0.2, 0.7]]), torch.tensor([[0, 0]]), torch.tensor([8]))
        >>> metric.compute()
        tensor([1., nan])
    """

    def compute(self) -> Tensor:
        """Average precision of each class."""
        return average_precision(*self._once()).float().to(self.device)


def first_places(values: Tensor) -> Tensor:
    """Index of the first of each value in (n,), ascending: which images to keep among duplicates.

    Example:
        >>> first_places(torch.tensor([7, 3, 7, 5]))
        tensor([0, 1, 3])
    """
    different, group = values.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    places = torch.full_like(different, len(values), dtype=torch.int64)
    order = torch.arange(len(values), device=values.device)
    return places.scatter_reduce(0, group, order, "amin").sort().values


def _average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    scores = scores.double()
    order = scores.argsort(dim=0, descending=True)
    scores, targets = scores.gather(0, order), targets.gather(0, order)
    place = torch.arange(len(scores), device=scores.device)[:, None].expand_as(scores)
    ends = torch.ones_like(targets, dtype=torch.bool)
    ends[:-1] = scores[:-1] != scores[1:]
    # A tie is retrieved at once, at the precision of its last image.
    tie_end = torch.where(ends, place, len(scores) - 1).flip(0).cummin(0).values.flip(0)
    found = (targets == 1).cumsum(0)
    precision = found.double() / (targets >= 0).cumsum(0).clamp(min=1)
    by_class = (precision.gather(0, tie_end) * (targets == 1)).sum(0) / found[-1]
    return by_class.where((targets == 0).any(0), torch.nan)


def _precision_and_recall(predicted: Tensor, targets: Tensor, suffix: str) -> dict[str, float]:
    present = targets == 1
    right, all_predicted, all_present = ((predicted & present).sum(0), predicted.sum(0), present.sum(0))
    counted = (all_present > 0) & (targets == 0).any(0)
    overall = [_share(right.sum(), all_predicted.sum()).item(), _share(right.sum(), all_present.sum()).item()]
    by_class = [_share(right, other)[counted].mean().item() for other in (all_predicted, all_present)]
    return {
        f"{kind}{name}{suffix}": value
        for kind, pair in (("O", overall), ("C", by_class))
        for name, value in zip(("P", "R", "F1"), [*pair, _harmonic_mean(*pair)], strict=True)
    }


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part.double() / whole.clamp(min=1)  # a part of nothing is 0


def _harmonic_mean(left: float, right: float) -> float:
    return 2 * left * right / (left + right) if left + right else 0.0


def checked_targets(scores: Tensor, targets: Tensor) -> Tensor:
    """Targets as int8, once they and the scores (n, L) are found to be in order.

    Raises:
        ValueError: If the shapes differ or have no label axis, a score is NaN or a target is none of 1, 0, −1.
        TypeError: If the targets are floats.
    """
    if scores.shape != targets.shape or scores.ndim != 2:
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} and targets of shape {tuple(targets.shape)} do not fit: "
            "give both as (n, L), or both as (n,) for the average precision of one label"
        )
    if targets.is_floating_point() or targets.is_complex():
        raise TypeError(
            f"targets of {targets.dtype} are ambiguous: give bool or integers, 1 present, 0 absent, -1 unknown"
        )
    # Compared before the cast, in which 257 would become 1.
    if targets.dtype != torch.bool and ((targets > 1).any() or (targets.dtype.is_signed and (targets < -1).any())):
        raise ValueError("targets hold values other than 1 (present), 0 (absent) and -1 (unknown): recode them first")
    if scores.isnan().any():
        raise ValueError("scores hold NaN, which has no rank: look for the NaN in the features or the model first")
    return targets.to(torch.int8)


def _check_settings(threshold: float, top_k: int) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} was given: pass a probability between 0 and 1, such as {THRESHOLD}")
    if top_k < 1:
        raise ValueError(f"top_k={top_k} was given: pass a number of labels of at least 1, such as {TOP_K}")
