"""Check the inputs of a loss and the outputs of custom forms and positives."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BOX_TOLERANCE = 1e-3
"""Tolerance for boxes that extend beyond the image; half precision gets its own epsilon."""


def check_inside_image(name: str, boxes: Tensor | None) -> None:
    """Refuse boxes (n, 4) that extend beyond the image.

    Raises:
        ValueError: Names the first one.
    """
    if boxes is None:
        return
    tolerance, boxes = max(BOX_TOLERANCE, torch.finfo(boxes.dtype).eps), boxes.float()
    ends = torch.cat([boxes, boxes[:, :2] + boxes[:, 2:]], dim=1)
    inside = ((ends >= -tolerance) & (ends <= 1 + tolerance)).all(dim=1)
    if not bool(inside.all()):
        index = int((~inside).nonzero()[0, 0])
        raise ValueError(
            f"{name}[{index}] is {[round(number, 4) for number in boxes[index].tolist()]}: pass top, left, height and "
            "width as fractions of the image, within 0–1."
        )


def check_shape(argument: str, returned: Tensor, shape: torch.Size, meaning: str) -> None:
    """Refuse a wrong shape returned by a form or positives.

    Raises:
        ValueError: Names both shapes.
    """
    if returned.shape != shape:
        raise ValueError(
            f"{argument} returned shape {tuple(returned.shape)}: return {tuple(shape)}, {meaning} of the chunk."
        )


def check_weights(weights: Tensor, cosines: Tensor) -> None:
    """Refuse weights (c, M) that are negative or not finite.

    Raises:
        ValueError: Names their range.
    """
    low, high = (bound.item() for bound in weights.aminmax())
    if not (low >= 0 and high < math.inf) and bool(cosines.isfinite().all()):  # a NaN feature makes the loss NaN
        raise ValueError(
            f"positives returned weights from {low:g} to {high:g}: return finite numbers of at least 0, with 0 for a "
            "key that is not a positive."
        )


def check_losses(losses: Tensor, logits: Tensor, counted: Tensor) -> None:
    """Refuse losses (c,) of counted anchors that are not finite although their logits are.

    Raises:
        ValueError: Names the usual causes.
    """
    if not bool((losses.isfinite() | ~counted).all()) and not bool(logits.isnan().any()):
        raise ValueError(
            "form returned a value that is not finite from finite cosines: handle the anchor's own logit, which is "
            "-inf, and anchors without a negative."
        )
