"""The image-aware term's sum over anchors and its gradient, a chunk of anchors at a time."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**22
"""Similarities compared at a time where nobody says how many anchors: 16 MB in float32."""

_FINITE_EXPONENTS = {torch.float32: 80.0, torch.float64: 700.0}
"""exp(−x) of at most this is not rounded to 0."""


_SHORTEST = 1e-12
"""Length below which a line is not stretched to 1, as in torch's normalize, because its gradient would be huge."""


class Form(NamedTuple):
    """Which of the term's forms: temperature τ, positives summed inside the logarithm or outside, gate or None."""

    temperature: float
    sum_inside: bool
    min_similarity: float | None


class Places(NamedTuple):
    """Images (R,) of the anchors and (M,) of the keys, and each anchor's own place (R,) in the keys, −1 for none."""

    image_ids: Tensor
    key_image_ids: Tensor
    self_index: Tensor


def sum_over_anchors(
    anchors: Tensor, keys: Tensor | None, places: Places, form: Form, chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    """Sum of ℓ_i · τ_b/τ over the anchors with a positive, and their number.

    The gradient is computed with the value, while the similarities of a chunk are at hand, so that none is kept; it
    cannot be differentiated again. Memory beyond features, gradients and one normalised copy of the features is a few
    times that of one chunk's similarities. Where the keys are the anchors, similarity is symmetric, and half of it is
    computed, twice: two matrix products in all, against the three of the plain formulation.

    Args:
        anchors: (R, P), not normalised.
        keys: (M, P), or None for the anchors, each being its own key.
        places: Of anchors and keys.
        form: Of the term.
        chunk_size: Anchors compared at a time; None: as many as have `CHUNK_ELEMENTS` similarities.

    Returns:
        A scalar in at least float32 and an integer scalar.
    """
    total, count = _SumOverAnchors.apply(anchors, keys, places, form, chunk_size, torch.is_grad_enabled())
    return total, count


class _SumOverAnchors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        keys: Tensor | None,
        places: Places,
        form: Form,
        chunk_size: int | None,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        to_anchors, to_keys = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        units, inverse = _units(anchors)
        num_keys = len(anchors) if keys is None else len(keys)
        step = chunk_size or max(1, CHUNK_ELEMENTS // max(1, num_keys))
        gradients: tuple[Tensor | None, Tensor | None] = (None, None)
        with torch.autocast(anchors.device.type, enabled=False):  # which would round the products to bfloat16
            if keys is None and 2 / form.temperature <= _FINITE_EXPONENTS[units.dtype]:
                total, count, gradient = _among_themselves(units, places.image_ids, form, step, to_anchors)
                gradients = (_through_normalisation(gradient, units, inverse), None)
            else:
                key_units, key_inverse = (units, inverse) if keys is None else _units(keys)
                wanted = to_anchors, to_anchors if keys is None else to_keys
                total, count, gradient, key_gradient = _against_keys(units, key_units, places, form, step, wanted)
                if keys is None:
                    gradient = None if gradient is None or key_gradient is None else gradient.add_(key_gradient)
                    key_gradient = None
                gradients = (
                    _through_normalisation(gradient, units, inverse),
                    _through_normalisation(key_gradient, key_units, key_inverse),
                )
        ctx.save_for_backward(*gradients)
        ctx.dtypes = anchors.dtype, anchors.dtype if keys is None else keys.dtype
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor, _of_count: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            None if gradient is None else (gradient * of_total).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None, None


def _units(features: Tensor) -> tuple[Tensor, Tensor]:
    """Lines of length 1 (a line of zeros stays), and what they were multiplied by (R, 1)."""
    wide = features if features.dtype == torch.float64 else features.float()
    length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    inverse = torch.where(length == 0, 0, 1 / length.clamp(min=_SHORTEST))
    return wide * inverse, inverse


def _through_normalisation(gradient: Tensor | None, units: Tensor, inverse: Tensor) -> Tensor | None:
    """From the gradient with respect to the unit lines to that with respect to the features, in place."""
    if gradient is None:
        return None
    step = max(1, CHUNK_ELEMENTS // max(1, units.shape[1]))
    for start in range(0, len(units), step):
        part = slice(start, start + step)
        along = torch.linalg.vecdot(gradient[part], units[part]).unsqueeze(1)
        gradient[part].addcmul_(units[part], along, value=-1).mul_(inverse[part])
    return gradient


def _among_themselves(
    units: Tensor, image_ids: Tensor, form: Form, step: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and anchors are one: of the symmetric matrix only the chunks on and above the diagonal are computed.

    Every sum of exponentials is taken of s − 1/τ, which no similarity exceeds and at the temperatures that come here
    none rounds to 0.
    """
    num = len(units)
    sum_all, sum_positive, positive_logits = units.new_zeros(3, num)
    num_positives = torch.zeros(num, dtype=torch.long, device=units.device)
    for start in range(0, num, step):
        rows, right = slice(start, start + step), slice(start + step, num)
        shifted, exponentials, is_positive = _chunk(units, image_ids, form, start, step)
        positive_part = exponentials * is_positive if form.sum_inside else shifted * is_positive
        into = sum_positive if form.sum_inside else positive_logits
        for sums, part in ((sum_all, exponentials), (into, positive_part), (num_positives, is_positive)):
            sums[rows] += part.sum(dim=1)
            sums[right] += part[:, step:].sum(dim=0)
    has_positive = num_positives > 0
    weight = has_positive.to(units.dtype) / num_positives.clamp(min=1)
    log_all = sum_all.masked_fill(sum_all == 0, 1).log()  # 0 where there is no other key
    if form.sum_inside:
        sum_positive.masked_fill_(~has_positive, 1)
        per_anchor = weight * (log_all - sum_positive.log())
    else:
        per_anchor = has_positive * log_all - weight * positive_logits
    if not with_gradient:
        return per_anchor.sum(), has_positive.sum(), None

    # Of the gradient with respect to s: pull · exp(s_ij) for all, less the positives' push · exp(s_ij) + constant.
    pull = (weight if form.sum_inside else has_positive) / sum_all.masked_fill(sum_all == 0, 1)
    push = weight / sum_positive if form.sum_inside else torch.zeros_like(pull)
    constant = torch.zeros_like(pull) if form.sum_inside else weight
    gradient = torch.zeros_like(units)
    for start in range(0, num, step):
        rows, right = slice(start, start + step), slice(start + step, num)
        _, exponentials, is_positive = _chunk(units, image_ids, form, start, step)
        both = _both_roles(push if form.sum_inside else constant, start, step)
        both = (both * exponentials if form.sum_inside else both).mul_(is_positive)
        exponentials.mul_(_both_roles(pull, start, step)).sub_(both).div_(form.temperature)
        gradient[rows].addmm_(exponentials, units[start:])
        gradient[right].addmm_(exponentials[:, step:].T, units[rows])
    return per_anchor.sum(), has_positive.sum(), gradient


def _chunk(units: Tensor, image_ids: Tensor, form: Form, start: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits s − 1/τ, their exponentials and which are positives', of `step` anchors and the keys from the first on."""
    cosines = units[start : start + step] @ units[start:].T
    is_positive = image_ids[start : start + step, None] == image_ids[None, start:]
    if form.min_similarity is not None:
        is_positive &= cosines >= form.min_similarity
    is_positive.diagonal().fill_(False)
    shifted = cosines.sub_(1).div_(form.temperature)
    exponentials = shifted.exp()
    exponentials.diagonal().zero_()
    return shifted, exponentials, is_positive


def _both_roles(values: Tensor, start: int, step: int) -> Tensor:
    """An anchor's value as the anchor plus the other one's, for which it is a key."""
    return values[start : start + step, None] + values[None, start:]


def _against_keys(
    units: Tensor, keys: Tensor, places: Places, form: Form, step: int, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Any keys: a chunk holds whole lines of similarities, so value and gradient take one look at it."""
    total, count = units.new_zeros(()), torch.zeros((), dtype=torch.long, device=units.device)
    gradient = torch.zeros_like(units) if wanted[0] else None
    key_gradient = torch.zeros_like(keys) if wanted[1] else None
    own_places = torch.arange(len(keys), device=units.device)
    for start in range(0, len(units) if len(keys) else 0, step):
        rows = slice(start, start + step)
        logits = units[rows] @ keys.T
        is_self = places.self_index[rows, None] == own_places[None, :]
        is_positive = (places.image_ids[rows, None] == places.key_image_ids[None, :]) & ~is_self
        if form.min_similarity is not None:
            is_positive &= logits >= form.min_similarity
        logits.div_(form.temperature)
        num_positives = is_positive.sum(dim=1, keepdim=True)
        has_positive = num_positives > 0
        weight = has_positive.to(units.dtype) / num_positives.clamp(min=1)
        # Lines that are left out keep all their entries, so that no logsumexp runs over nothing (−∞).
        kept = logits.masked_fill(is_self & has_positive, -math.inf)
        log_all = kept.logsumexp(dim=1, keepdim=True)
        if form.sum_inside:
            positive = logits.masked_fill(~is_positive & has_positive, -math.inf)
            log_positive = positive.logsumexp(dim=1, keepdim=True)
            per_anchor = weight * (log_all - log_positive)
        else:
            per_anchor = has_positive * log_all - weight * (logits * is_positive).sum(dim=1, keepdim=True)
        total = total + per_anchor.sum()
        count = count + has_positive.sum()
        if gradient is None and key_gradient is None:
            continue
        slope = kept.sub_(log_all).exp_().mul_(weight if form.sum_inside else has_positive)
        slope -= positive.sub_(log_positive).exp_().mul_(weight) if form.sum_inside else weight * is_positive
        slope.div_(form.temperature)
        if gradient is not None:
            torch.mm(slope, keys, out=gradient[rows])
        if key_gradient is not None:
            key_gradient.addmm_(slope.T, units[rows])
    return total, count, gradient, key_gradient
