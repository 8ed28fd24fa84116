"""The two terms of the loss: from features and image ids to a scalar."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from mlssl.chunks import sum_over_chunks, unit_rows
from mlssl.forms import (
    Form,
    Positives,
    by_overlap,
    form_of,
    gated,
    log_of_sum,
    mean_of_logs,
    positives_of,
    same_image,
)
from mlssl.loss_checks import check_inside_image, check_losses, check_shape, check_weights

__all__ = [
    "ImageAwareContrastiveLoss",
    "NegativeCosineSimilarity",
    "by_overlap",
    "gated",
    "image_aware_contrastive_loss",
    "log_of_sum",
    "mean_of_logs",
    "negative_cosine_similarity",
    "same_image",
]

Reduction = Literal["mean", "sum_and_count"]


# fmt: off
@overload
def image_aware_contrastive_loss(
    anchors: Tensor, image_ids: Tensor, keys: Tensor | None = ..., key_image_ids: Tensor | None = ..., *,
    self_index: Tensor | None = ..., boxes: Tensor | None = ..., key_boxes: Tensor | None = ...,
    temperature: float = ..., base_temperature: float = ..., form: str | Form = ..., positives: str | Positives = ...,
    chunk_size: int | None = ..., reduction: Literal["mean"] = ...,
) -> Tensor: ...
@overload
def image_aware_contrastive_loss(
    anchors: Tensor, image_ids: Tensor, keys: Tensor | None = ..., key_image_ids: Tensor | None = ..., *,
    self_index: Tensor | None = ..., boxes: Tensor | None = ..., key_boxes: Tensor | None = ...,
    temperature: float = ..., base_temperature: float = ..., form: str | Form = ..., positives: str | Positives = ...,
    chunk_size: int | None = ..., reduction: Literal["sum_and_count"],
) -> tuple[Tensor, Tensor]: ...
# fmt: on
def image_aware_contrastive_loss(
    anchors: Tensor,
    image_ids: Tensor,
    keys: Tensor | None = None,
    key_image_ids: Tensor | None = None,
    *,
    self_index: Tensor | None = None,
    boxes: Tensor | None = None,
    key_boxes: Tensor | None = None,
    temperature: float = 0.3,
    base_temperature: float = 0.07,
    form: str | Form = "log_of_sum",
    positives: str | Positives = "same_image",
    chunk_size: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Pull all views of an image together and push views of other images away.

    With A(i) all keys except the anchor itself, P(i) the keys with a weight w above 0, and s_ij = cos(f_i, f_j) / τ:

    - ``log_of_sum``: ℓ_i = 1/\|P(i)\| · [logsumexp_A(i) s_ia − log Σ_P(i) w_ip exp s_ip]   (arXiv 2506.23156)
    - ``mean_of_logs``: ℓ_i = Σ_P(i) w_ip [logsumexp_A(i) s_ia − s_ip] / Σ_P(i) w_ip   (arXiv 2004.11362, eq. 2)

    The loss is τ/τ_b times the mean of ℓ_i over the anchors with a positive. Other anchors do not enter sum or count;
    if no anchor has a positive, the loss is 0 with zero gradients. A zero feature has cosine 0 with all others and gets
    no gradient. Autograd computes the gradient of the form per chunk of anchors, together with the value; second
    derivatives are not supported.

    Args:
        anchors: Features (R, P), need not be normalised. Computed in float32, or float64 if given.
        image_ids: Integers (R,): the image of each anchor.
        keys: Features (M, P) to compare with; the anchors by default.
        key_image_ids: Integers (M,); required with ``keys``.
        self_index: Integers (R,): each anchor's own index in ``keys``, −1 for none; that key is excluded from A(i) and
            P(i). Default: i if the keys are the anchors, −1 if ``keys`` are given.
        boxes: Floats (R, 4): top, left, height and width of each anchor's view, as fractions of its image. Only used by
            ``positives``.
        key_boxes: Floats (M, 4), the same for the keys; required with ``keys`` and ``boxes``.
        temperature: τ > 0 (default of the paper's code).
        base_temperature: τ_b > 0, only scales the loss (SupCon: 0.07).
        form: ``log_of_sum``, ``mean_of_logs``, or a :data:`mlssl.forms.Form`: logits and weights (c, M) of c anchors to
            ℓ (c,), row by row, in plain torch without parameters.
        positives: ``same_image``, ``gated(0.3)``, ``by_overlap(1.0)``, or a :data:`mlssl.forms.Positives` that returns
            the weights (c, M) ≥ 0 of the keys.
        chunk_size: Anchors compared at a time: memory grows with ``chunk_size`` × M instead of R × M, with the same
            value and gradient. None: chunks of 2²¹ cosines.
        reduction: ``mean``, or ``sum_and_count`` for its numerator and denominator, to be summed over devices.

    Returns:
        Scalar in at least float32. With ``sum_and_count``: the sum, and the number of anchors with a positive, an
        integer scalar without gradient.

    Raises:
        ValueError: Shapes do not match, a temperature is ≤ 0, ``form``, ``positives`` or ``reduction`` is unknown,
            ``chunk_size`` < 1, or a form or positives returns a wrong shape. On the CPU, where checks need no
            synchronisation, also: boxes are outside 0–1, weights are negative or not finite, or a form returns values
            that are not finite.

    >>> features = torch.eye(4)
    >>> float(image_aware_contrastive_loss(features, torch.tensor([0, 1, 2, 3])))  # no anchor has a positive
    0.0
    """
    compared = _compared(anchors, image_ids, keys, key_image_ids, self_index, boxes, key_boxes)
    settings = _settings(temperature, base_temperature, form, positives, chunk_size)
    return _image_aware(anchors, keys, compared, settings, reduction, checks_values=False)


def negative_cosine_similarity(p: Tensor, z: Tensor) -> Tensor:
    """Negative mean cosine between row i of ``p`` and row i of ``z`` (SimSiam, arXiv 2011.10566, eq. 1).

    Args:
        p: Features (N, P) of the predictor. Computed in float32, or float64 if given.
        z: Features (N, P) of the projector. The gradient flows into both; SimSiam passes ``z.detach()``.

    Returns:
        Scalar in −1–1.

    Raises:
        ValueError: The shapes differ, or there are no rows.
    """
    if p.shape != z.shape or p.ndim != 2 or len(p) == 0:
        raise ValueError(
            f"p has shape {tuple(p.shape)} and z {tuple(z.shape)}: pass two matrices of one shape (N, P), N ≥ 1."
        )
    return -(unit_rows(p) * unit_rows(z)).sum(dim=1).mean()


class ImageAwareContrastiveLoss(nn.Module):
    """:func:`image_aware_contrastive_loss` as a module with fixed settings.

    Args:
        temperature: τ > 0.
        base_temperature: τ_b > 0.
        form: Name or function.
        positives: Name or function.
        chunk_size: Anchors compared at a time; None: chunks of 2²¹ cosines.
    """

    checks_values = False
    """Set to True to check values on any device, which synchronises; on the CPU they are always checked."""

    group: Any = None
    """Process group whose keys are compared, see `mlssl.callbacks.CompareWithinGroups`; None: all devices."""

    def __init__(
        self,
        temperature: float = 0.3,
        base_temperature: float = 0.07,
        form: str | Form = "log_of_sum",
        positives: str | Positives = "same_image",
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        _settings(temperature, base_temperature, form, positives, chunk_size)  # raises on bad ones
        self.temperature = temperature
        self.base_temperature = base_temperature
        self.form = form_of(form)
        self.positives = positives_of(positives)
        self.chunk_size = chunk_size

    def forward(
        self,
        anchors: Tensor,
        image_ids: Tensor,
        keys: Tensor | None = None,
        key_image_ids: Tensor | None = None,
        *,
        self_index: Tensor | None = None,
        boxes: Tensor | None = None,
        key_boxes: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Arguments (R, P), (R,), (M, P), (M,), (R,), (R, 4), (M, 4) as in :func:`image_aware_contrastive_loss`."""
        compared = _compared(anchors, image_ids, keys, key_image_ids, self_index, boxes, key_boxes)
        settings = _settings(self.temperature, self.base_temperature, self.form, self.positives, self.chunk_size)
        return _image_aware(anchors, keys, compared, settings, reduction, self.checks_values)


class NegativeCosineSimilarity(nn.Module):
    """:func:`negative_cosine_similarity` as a module."""

    def forward(self, p: Tensor, z: Tensor) -> Tensor:
        """Map two matrices (N, P) to a scalar in −1–1."""
        return negative_cosine_similarity(p, z)


class _Settings(NamedTuple):
    temperature: float
    base_temperature: float
    form: Form
    positives: Positives
    chunk_size: int | None


class _Compared(NamedTuple):
    """Attributes of anchors (R) and keys (M) other than their features; self_index is −1 for none."""

    image_ids: Tensor
    key_image_ids: Tensor
    self_index: Tensor
    boxes: Tensor | None
    key_boxes: Tensor | None


def _image_aware(
    anchors: Tensor,
    keys: Tensor | None,
    compared: _Compared,
    settings: _Settings,
    reduction: Reduction,
    checks_values: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    if reduction not in ("mean", "sum_and_count"):
        raise ValueError(f"reduction={reduction!r} is unknown: pass 'mean' or 'sum_and_count'.")
    temperature, base_temperature, form, positives, chunk_size = settings
    image_ids, key_image_ids, self_index, boxes, key_boxes = compared
    checks_values = checks_values or anchors.device.type == "cpu"
    if checks_values:
        check_inside_image("boxes", boxes)
        check_inside_image("key_boxes", key_boxes)
    key_index = torch.arange(len(key_image_ids), device=anchors.device)

    def of_chunk(cosines: Tensor, rows: slice, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        is_self = self_index[rows, None] == key_index[None, :]
        of_same_image = (image_ids[rows, None] == key_image_ids[None, :]) & ~is_self
        weights = positives(cosines, of_same_image, None if boxes is None else boxes[rows], key_boxes)
        check_shape("positives", weights, cosines.shape, "one weight per cosine")
        weights = weights.to(cosines.dtype).masked_fill(is_self, 0)  # always a copy
        if checks_values:
            check_weights(weights, cosines)
        counted = (weights > 0).any(dim=1)
        left_out = 0 * cosines.sum(dim=1)  # 0, or NaN for a NaN feature, which no gate may hide
        logits = cosines.div_(temperature).masked_fill_(is_self, -math.inf)
        # Anchors without a positive get equal logits and one positive, so that every form is finite there.
        logits.masked_fill_(~counted[:, None], 0)
        weights[:, 0] = torch.where(counted, weights[:, 0], 1)
        with torch.set_grad_enabled(with_gradient):
            losses = form(logits.requires_grad_(with_gradient), weights)
            check_shape("form", losses, counted.shape, "one value per anchor")
            if checks_values:
                check_losses(losses, logits, counted)
            total = torch.where(counted, losses, left_out).sum()
        slope = torch.autograd.grad(total, logits)[0].div_(temperature) if total.requires_grad else None
        return total.detach(), counted.sum(), slope

    total, count = sum_over_chunks(of_chunk, anchors, keys, chunk_size)
    total = (temperature / base_temperature) * total
    return total / count.clamp(min=1) if reduction == "mean" else (total, count)


def _settings(
    temperature: float,
    base_temperature: float,
    form: str | Form,
    positives: str | Positives,
    chunk_size: int | None,
) -> _Settings:
    for name, value in {"temperature": temperature, "base_temperature": base_temperature}.items():
        if not value > 0:
            raise ValueError(f"{name}={value} was given: pass a number above 0.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} was given: pass at least 1, or None for chunks of 2²¹ cosines.")
    return _Settings(temperature, base_temperature, form_of(form), positives_of(positives), chunk_size)


def _compared(
    anchors: Tensor,
    image_ids: Tensor,
    keys: Tensor | None,
    key_image_ids: Tensor | None,
    self_index: Tensor | None,
    boxes: Tensor | None,
    key_boxes: Tensor | None,
) -> _Compared:
    """Check the shapes and fill in the defaults."""
    if anchors.ndim != 2 or image_ids.shape != anchors.shape[:1]:
        raise ValueError(
            f"anchors have shape {tuple(anchors.shape)} and image_ids {tuple(image_ids.shape)}: pass (R, P) and (R,)."
        )
    if (keys is None) != (key_image_ids is None):
        raise ValueError(
            "keys and key_image_ids belong together: pass both, or neither to compare the anchors with each other."
        )
    own_index = torch.arange(len(anchors), device=anchors.device)
    if keys is None or key_image_ids is None:
        if key_boxes is not None:
            raise ValueError("key_boxes belong to keys, which are not given: pass only boxes, or also keys.")
        key_image_ids, key_boxes = image_ids, boxes
        self_index = own_index if self_index is None else self_index
    else:
        if keys.ndim != 2 or keys.shape[1] != anchors.shape[1] or key_image_ids.shape != keys.shape[:1]:
            raise ValueError(
                f"keys have shape {tuple(keys.shape)} and key_image_ids {tuple(key_image_ids.shape)}: "
                f"pass (M, {anchors.shape[1]}) and (M,)."
            )
        if (boxes is None) != (key_boxes is None):
            raise ValueError("with keys, boxes and key_boxes belong together: pass both, or neither.")
        self_index = torch.full_like(own_index, -1) if self_index is None else self_index
    if self_index.shape != image_ids.shape:
        raise ValueError(
            f"self_index has shape {tuple(self_index.shape)}: pass one index for each of the {len(anchors)} anchors."
        )
    for name, given, number in (("boxes", boxes, len(anchors)), ("key_boxes", key_boxes, len(key_image_ids))):
        if given is not None and (given.shape != (number, 4) or not given.is_floating_point()):
            raise ValueError(
                f"{name} have shape {tuple(given.shape)} and are {given.dtype}: pass ({number}, 4) floats, top, left, "
                "height and width as fractions of the image."
            )
    return _Compared(image_ids, key_image_ids, self_index, boxes, key_boxes)
