"""Multi-label metrics: average precision, precision, recall and F1, as functions and as torchmetrics' `Metric`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

THRESHOLD = 0.5
"""Minimum probability of a predicted label, as in ML-GCN (arXiv 1904.03582)."""

RANKED_NUMBERS = 2**22
"""Number of scores ranked at a time."""

TOP_K = 3
"""Labels per image in the top-k scores, as usual since J. Wang et al., arXiv 1604.04573."""


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Non-interpolated average precision of each label: the sum over thresholds of (recall gained) × precision.

    Images with equal scores share one threshold, so the order of the images does not matter; the result is that of
    `sklearn.metrics.average_precision_score` on the images whose target is known. A label without a known negative has
    no average precision: any scores would rank it perfectly.

    Args:
        scores: (n, L) or (n,), any real numbers, higher means more likely; infinities are fine.
        targets: same shape, bool or integer: 1 present, 0 absent, −1 unknown (the image is left out for that label).

    Returns:
        (L,) or scalar, float64, in 0–1; NaN for a label without a positive or without a negative (n = 0 included).

    Raises:
        ValueError: If the shapes differ, a score is NaN or a target is not 1, 0 or −1.
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

    # One group of labels at a time: the working memory is a dozen times that of their scores.
    size = max(1, RANKED_NUMBERS // len(scores))
    groups = [slice(start, start + size) for start in range(0, scores.shape[1], size)]
    return torch.cat([_average_precision(scores[:, group], targets[:, group]) for group in groups])


def mean_average_precision(scores: Tensor, targets: Tensor) -> tuple[float, int]:
    """Mean over the labels of `average_precision`; a label without a positive or without a negative is left out.

    Args:
        scores: (n, L), higher means more likely.
        targets: (n, L), bool or integer: 1 present, 0 absent, −1 unknown.

    Returns:
        mAP in 0–1 and the number of labels in the mean; (NaN, 0) if no label has a positive and a negative.

    Raises:
        ValueError: If the arguments are not (n, L), or as in `average_precision`.
        TypeError: If the targets are floats.

    Example:
        >>> mean_average_precision(torch.tensor([[0.9, 0.1], [0.2, 0.4]]), torch.tensor([[1, 0], [0, 0]]))
        (1.0, 1)
    """
    if scores.ndim != 2:
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} have no label axis: pass (n, L), or use average_precision"
        )
    per_class = average_precision(scores, targets)
    counted = per_class.isfinite()
    return per_class.nanmean().item(), int(counted.sum())


def multilabel_scores(
    probabilities: Tensor, targets: Tensor, *, threshold: float = THRESHOLD, top_k: int = TOP_K
) -> dict[str, float]:
    """The scores reported in multi-label papers, as defined by Z.-M. Chen et al. (ML-GCN, arXiv 1904.03582, sec. 4.1).

    A label is predicted if its probability is at least the threshold. OP and OR pool the labels of all classes and
    images: correct predictions ÷ predictions, and ÷ present labels. CP and CR are means of each class's precision and
    recall. OF1 and CF1 are the harmonic means of the two, so CF1 is not the mean of the classes' F1. `OP@3` and so on
    use only the 3 most probable known labels of each image, if these reach the threshold; ties are broken by column
    index. Unknown labels are left out of all scores.

    Args:
        probabilities: (n, L) in 0–1, after the sigmoid.
        targets: (n, L), bool or integer: 1 present, 0 absent, −1 unknown.
        threshold: In 0–1, one for all classes.
        top_k: At least 1; values above L mean all labels.

    Returns:
        Fractions "mAP", "OP", "OR", "OF1", "CP", "CR", "CF1", "OP@3", "OR@3", "OF1@3", "CP@3", "CR@3", "CF1@3" (with
        `top_k` after the @), and "classes", the number of classes with a positive and a negative: mAP, CP and CR
        are means over these, and NaN if there are none. The precision of a class that is never predicted is 0, as
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
            f"probabilities are between {probabilities.min():g} and {probabilities.max():g}, expected 0 to 1: "
            "take the sigmoid of logits first"
        )
    mean, classes = mean_average_precision(probabilities, targets)
    known = targets >= 0
    predicted = (probabilities >= threshold) & known
    ranked = torch.where(known, probabilities, -1.0).argsort(dim=1, descending=True, stable=True)
    among_top = torch.zeros_like(known).scatter(1, ranked[:, :top_k], True)
    scores = _precision_and_recall(predicted, targets, "")
    scores |= _precision_and_recall(predicted & among_top, targets, f"@{top_k}")
    return {"mAP": mean, **scores, "classes": classes}


class _ByImage(Metric):
    """Stores probabilities, targets and ids of all images, over all processes; a repeated id counts once."""

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
            image_ids: (B,), to detect images that a distributed sampler repeats.

        Raises:
            ValueError: If the shapes do not match or a target is not 1, 0 or −1.
            TypeError: If the targets are floats.
        """
        targets = checked_targets(probabilities, targets)
        if image_ids.shape != probabilities.shape[:1]:
            raise ValueError(
                f"image_ids of shape {tuple(image_ids.shape)} were given for {len(probabilities)} images: pass one id "
                "per image"
            )
        self.probabilities.append(probabilities.detach().float())
        self.targets.append(targets)
        self.image_ids.append(image_ids)

    def _unique_images(self) -> tuple[Tensor, Tensor]:
        """Probabilities and targets of each image, on the CPU, because not every device sorts in float64."""
        unique = first_indices(dim_zero_cat(self.image_ids))
        return dim_zero_cat(self.probabilities)[unique].cpu(), dim_zero_cat(self.targets)[unique].cpu()


class MultiLabelScores(_ByImage):
    """`multilabel_scores` of a whole set in batches, on one process or several.

    `update(probabilities, targets, image_ids)`; `compute()` returns the dictionary of `multilabel_scores` as scalar
    tensors. The result is that of one process: images are gathered, and repeated ids count once.

    Args:
        threshold: Minimum probability, in 0–1, of a predicted label.
        top_k: At least 1.
        **settings: Arguments of `torchmetrics.Metric`.

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
        scores = multilabel_scores(*self._unique_images(), threshold=self.threshold, top_k=self.top_k)
        return {name: torch.tensor(float(value), device=self.device) for name, value in scores.items()}


class MultiLabelAveragePrecision(_ByImage):
    """`average_precision` of each class of a whole set in batches, on one process or several.

    `update(probabilities, targets, image_ids)` takes any scores; `compute()` returns (L,) float32, NaN for a class
    without a positive or a negative. Images are gathered, and repeated ids count once.

    Example:
        >>> metric = MultiLabelAveragePrecision()
        >>> metric.update(torch.tensor([[0.9, 0.6]]), torch.tensor([[1, 0]]), torch.tensor([7]))
        >>> metric.update(torch.tensor([[0.2, 0.7]]), torch.tensor([[0, 0]]), torch.tensor([8]))
        >>> metric.compute()
        tensor([1., nan])
    """

    def compute(self) -> Tensor:
        """Average precision of each class."""
        return average_precision(*self._unique_images()).float().to(self.device)


def first_indices(values: Tensor) -> Tensor:
    """Index of the first occurrence of each value in (n,), ascending: the images to keep among duplicates.

    Example:
        >>> first_indices(torch.tensor([7, 3, 7, 5]))
        tensor([0, 1, 3])
    """
    different, group = values.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    firsts = torch.full_like(different, len(values), dtype=torch.int64)
    order = torch.arange(len(values), device=values.device)
    return firsts.scatter_reduce(0, group, order, "amin").sort().values


def _average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    scores = scores.double()
    order = scores.argsort(dim=0, descending=True)
    scores, targets = scores.gather(0, order), targets.gather(0, order)
    position = torch.arange(len(scores), device=scores.device)[:, None].expand_as(scores)
    ends = torch.ones_like(targets, dtype=torch.bool)
    ends[:-1] = scores[:-1] != scores[1:]
    # Tied images are retrieved together, at the precision of the last one.
    tie_end = torch.where(ends, position, len(scores) - 1).flip(0).cummin(0).values.flip(0)
    hits = (targets == 1).cumsum(0)
    precision = hits.double() / (targets >= 0).cumsum(0).clamp(min=1)
    by_class = (precision.gather(0, tie_end) * (targets == 1)).sum(0) / hits[-1]
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
    return part.double() / whole.clamp(min=1)  # 0/0 is 0


def _harmonic_mean(left: float, right: float) -> float:
    return 2 * left * right / (left + right) if left + right else 0.0


def checked_targets(scores: Tensor, targets: Tensor) -> Tensor:
    """Check targets and scores (n, L), and return the targets as int8.

    Raises:
        ValueError: If the shapes differ or have no label axis, a score is NaN or a target is not 1, 0 or −1.
        TypeError: If the targets are floats.
    """
    if scores.shape != targets.shape or scores.ndim != 2:
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} and targets of shape {tuple(targets.shape)} do not match: "
            "pass both as (n, L), or both as (n,) for the average precision of one label"
        )
    if targets.is_floating_point() or targets.is_complex():
        raise TypeError(
            f"targets of {targets.dtype} are ambiguous: pass bool or integers, 1 present, 0 absent, -1 unknown"
        )
    # Compare before the cast, in which 257 would become 1.
    if targets.dtype != torch.bool and ((targets > 1).any() or (targets.dtype.is_signed and (targets < -1).any())):
        raise ValueError(
            "targets contain values other than 1 (present), 0 (absent) and -1 (unknown): recode them first"
        )
    if scores.isnan().any():
        raise ValueError("scores contain NaN, which has no rank: check the features and the model for NaN first")
    return targets.to(torch.int8)


def _check_settings(threshold: float, top_k: int) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} was given: pass a probability between 0 and 1, such as {THRESHOLD}")
    if top_k < 1:
        raise ValueError(f"top_k={top_k} was given: pass a number of labels, at least 1, such as {TOP_K}")
