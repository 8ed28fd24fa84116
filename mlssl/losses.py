"""The two terms of the method's loss: features and image ids in, a scalar out."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlssl.contrastive_sums import Form, Places, sum_over_anchors

Positives = Literal["log_of_sum", "mean_of_logs"]


def image_aware_contrastive_loss(
    anchors: Tensor,
    image_ids: Tensor,
    keys: Tensor | None = None,
    key_image_ids: Tensor | None = None,
    *,
    self_index: Tensor | None = None,
    temperature: float = 0.3,
    base_temperature: float = 0.07,
    positives: Positives = "log_of_sum",
    min_similarity: float | None = None,
    normalizer: Tensor | float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Tie all views of one image together and push the views of other images away.

    With A(i) all keys but the anchor itself, P(i) those of the same image, and s_ij = cos(f_i, f_j) / τ:

    - ``log_of_sum``: ℓ_i = (τ/τ_b) · 1/\|P(i)\| · [logsumexp_A(i) s_ia − logsumexp_P(i) s_ip]   (arXiv 2506.23156)
    - ``mean_of_logs``: ℓ_i = (τ/τ_b) · 1/\|P(i)\| · Σ_P(i) [logsumexp_A(i) s_ia − s_ip]   (arXiv 2004.11362, eq. 2)

    An anchor without a positive (one view an image, or none passes ``min_similarity``) is left out of sum and count;
    where no anchor has one, the loss is 0 with zero gradients. A feature of zeros has cosine 0 with all others and gets
    no gradient. The gradient is exact, and computed with the value; it cannot be differentiated again.

    Args:
        anchors: Features (R, P); they need not be normalised. Computed in at least float32, float64 stays.
        image_ids: Integers (R,): the image that each anchor shows.
        keys: Features (M, P) that the anchors are compared with; the anchors themselves by default.
        key_image_ids: Integers (M,); required with ``keys``.
        self_index: Integers (R,): each anchor's own place in ``keys``, which is left out of A(i) and P(i). By default
            anchor i is key i where the keys are the anchors, and no key is left out where ``keys`` are given.
        temperature: τ > 0 (default of the paper's code).
        base_temperature: τ_b > 0, which only scales the loss (SupCon's 0.07).
        positives: Whether the positives are summed inside or outside the logarithm.
        min_similarity: Cosine in −1–1 that a positive must reach to be counted (the "gated" form, 0.3 in the paper's
            code); only with ``mean_of_logs``.
        normalizer: What the sum over anchors is divided by; the number of anchors with a positive by default.
            Over devices, pass the number over all of them (:func:`count_anchors_with_positives`).
        chunk_size: Anchors compared at a time, so that memory grows with ``chunk_size`` × M instead of R × M. Same
            value and gradient. None: as many as have 16 MB of similarities.

    Returns:
        Scalar in at least float32.

    Raises:
        ValueError: On shapes that do not fit, a temperature ≤ 0, an unknown ``positives``, ``min_similarity`` outside
            −1–1 or together with ``log_of_sum``, ``chunk_size`` < 1.

    >>> features = torch.eye(4)
    >>> float(image_aware_contrastive_loss(features, torch.tensor([0, 1, 2, 3])))  # nobody has a positive
    0.0
    """
    _check_positive("temperature", temperature)
    _check_positive("base_temperature", base_temperature)
    if positives not in ("log_of_sum", "mean_of_logs"):
        raise ValueError(f"positives={positives!r} is unknown: pass 'log_of_sum' or 'mean_of_logs'.")
    if min_similarity is not None and positives == "log_of_sum":
        raise ValueError(
            f"min_similarity={min_similarity} gates single positives, and positives='log_of_sum' sums them first: "
            "pass positives='mean_of_logs', or min_similarity=None."
        )
    places = _places(anchors, image_ids, keys, key_image_ids, self_index, chunk_size)
    if keys is None and self_index is not None:
        keys = anchors  # an anchor's own place is wherever it is said to be
    form = Form(temperature, positives == "log_of_sum", _checked_gate(min_similarity))
    total, count = sum_over_anchors(anchors, keys, places, form, chunk_size)
    divisor = count.clamp(min=1) if normalizer is None else normalizer
    return (temperature / base_temperature) * total / divisor


def count_anchors_with_positives(
    anchors: Tensor,
    image_ids: Tensor,
    keys: Tensor | None = None,
    key_image_ids: Tensor | None = None,
    *,
    self_index: Tensor | None = None,
    min_similarity: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Count the anchors that :func:`image_aware_contrastive_loss` averages over, the arguments being the same.

    Returns:
        Integer scalar, on the device of the anchors, without gradient.
    """
    places = _places(anchors, image_ids, keys, key_image_ids, self_index, chunk_size)
    if _checked_gate(min_similarity) is None:
        return _num_positives(places).gt(0).sum()
    # Of this form every term counts its anchor once, whatever the temperature.
    form = Form(1.0, False, min_similarity)
    with torch.no_grad():
        return sum_over_anchors(anchors, anchors if keys is None else keys, places, form, chunk_size)[1]


def negative_cosine_similarity(p: Tensor, z: Tensor) -> Tensor:
    """Negative mean cosine between row i of ``p`` and row i of ``z`` (SimSiam, arXiv 2011.10566, eq. 1).

    Args:
        p: Features (N, P), of the predictor. Computed in at least float32, float64 stays.
        z: Features (N, P), of the projector. The gradient flows into both; SimSiam's form passes ``z.detach()``.

    Returns:
        Scalar in −1–1.

    Raises:
        ValueError: If the shapes differ, or there is no row.
    """
    if p.shape != z.shape or p.ndim != 2 or len(p) == 0:
        raise ValueError(
            f"p has shape {tuple(p.shape)} and z {tuple(z.shape)}: pass two matrices of one shape (N, P), N ≥ 1."
        )
    return -(_unit_rows(p) * _unit_rows(z)).sum(dim=1).mean()


class ImageAwareContrastiveLoss(nn.Module):
    """:func:`image_aware_contrastive_loss` with its settings kept.

    Args:
        temperature: τ > 0.
        base_temperature: τ_b > 0.
        positives: ``log_of_sum`` or ``mean_of_logs``.
        min_similarity: Cosine that a positive must reach, with ``mean_of_logs`` only.
        chunk_size: Anchors compared at a time; None: as many as have 16 MB of similarities.
    """

    def __init__(
        self,
        temperature: float = 0.3,
        base_temperature: float = 0.07,
        positives: Positives = "log_of_sum",
        min_similarity: float | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.base_temperature = base_temperature
        self.positives: Positives = positives
        self.min_similarity = min_similarity
        self.chunk_size = chunk_size
        # The function checks its settings: call it once, so that they fail where they are written.
        self(torch.eye(2), torch.tensor([0, 0]))

    def forward(
        self,
        anchors: Tensor,
        image_ids: Tensor,
        keys: Tensor | None = None,
        key_image_ids: Tensor | None = None,
        *,
        self_index: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """Arguments (R, P), (R,), (M, P), (M,), (R,) as in :func:`image_aware_contrastive_loss`."""
        return image_aware_contrastive_loss(
            anchors,
            image_ids,
            keys,
            key_image_ids,
            self_index=self_index,
            temperature=self.temperature,
            base_temperature=self.base_temperature,
            positives=self.positives,
            min_similarity=self.min_similarity,
            normalizer=normalizer,
            chunk_size=self.chunk_size,
        )


class NegativeCosineSimilarity(nn.Module):
    """:func:`negative_cosine_similarity` as a module."""

    def forward(self, p: Tensor, z: Tensor) -> Tensor:
        """Two matrices (N, P) to a scalar in −1–1."""
        return negative_cosine_similarity(p, z)


def _num_positives(places: Places) -> Tensor:
    """Keys (R,) of an anchor's image other than itself, by sorting instead of R × M comparisons."""
    ids, in_order = places.image_ids, places.key_image_ids.sort().values
    number = torch.searchsorted(in_order, ids, right=True) - torch.searchsorted(in_order, ids)
    if len(in_order) == 0:
        return number
    own_image = places.key_image_ids[places.self_index.clamp(min=0)]
    return number - ((places.self_index >= 0) & (own_image == ids)).long()


def _places(
    anchors: Tensor,
    image_ids: Tensor,
    keys: Tensor | None,
    key_image_ids: Tensor | None,
    self_index: Tensor | None,
    chunk_size: int | None,
) -> Places:
    """Check the shapes and fill in the defaults."""
    if anchors.ndim != 2 or image_ids.shape != anchors.shape[:1]:
        raise ValueError(
            f"anchors have shape {tuple(anchors.shape)} and image_ids {tuple(image_ids.shape)}: pass (R, P) and (R,)."
        )
    if (keys is None) != (key_image_ids is None):
        raise ValueError("keys and key_image_ids belong together: pass both, or neither to compare the anchors alone.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} was given: pass at least 1, or None for chunks of 16 MB.")
    own_places = torch.arange(len(anchors), device=anchors.device)
    if keys is None or key_image_ids is None:
        key_image_ids = image_ids
        self_index = own_places if self_index is None else self_index
    else:
        if keys.ndim != 2 or keys.shape[1] != anchors.shape[1] or key_image_ids.shape != keys.shape[:1]:
            raise ValueError(
                f"keys have shape {tuple(keys.shape)} and key_image_ids {tuple(key_image_ids.shape)}: "
                f"pass (M, {anchors.shape[1]}) and (M,)."
            )
        self_index = torch.full_like(own_places, -1) if self_index is None else self_index
    if self_index.shape != image_ids.shape:
        raise ValueError(
            f"self_index has shape {tuple(self_index.shape)}: pass one place for each of the {len(anchors)} anchors."
        )
    return Places(image_ids, key_image_ids, self_index)


def _checked_gate(min_similarity: float | None) -> float | None:
    if min_similarity is not None and not -1 <= min_similarity <= 1:
        raise ValueError(f"min_similarity={min_similarity} is no cosine: pass a number in −1–1, or None for no gate.")
    return min_similarity


def _unit_rows(features: Tensor) -> Tensor:
    wide = features if features.dtype == torch.float64 else features.float()
    # A line of zeros has no direction; its gradient would be divided by normalize's eps of 1e-12 instead of a length.
    return F.normalize(wide, dim=1).masked_fill((wide == 0).all(dim=1, keepdim=True), 0)


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}={value} was given: pass a number above 0.")
