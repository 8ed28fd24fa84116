"""Checks of values that a loss is given, and of what custom forms and positives return."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BOX_TOLERANCE = 1e-3
"""By how much a box may reach beyond the image; one in half precision may by its rounding."""


def check_inside_image(name: str, boxes: Tensor | None) -> None:
    """Refuse boxes (n, 4) that reach beyond the image.

    Raises:
        ValueError: With the first of them.
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
    """Refuse another shape than a form or positives should return.

    Raises:
        ValueError: With both shapes.
    """
    if returned.shape != shape:
        raise ValueError(
            f"{argument} returned shape {tuple(returned.shape)}: return {tuple(shape)}, {meaning} of the chunk."
        )


def check_weights(weights: Tensor, cosines: Tensor) -> None:
    """Refuse weights (c, M) that are negative or not finite.

    Raises:
        ValueError: With their range.
    """
    low, high = (bound.item() for bound in weights.aminmax())
    if not (low >= 0 and high < math.inf) and bool(cosines.isfinite().all()):  # a NaN feature shows in the loss
        raise ValueError(
            f"positives returned weights from {low:g} to {high:g}: return finite numbers of at least 0, with 0 for a "
            "key that is not a positive."
        )


def check_losses(losses: Tensor, logits: Tensor, counted: Tensor) -> None:
    """Refuse losses (c,) of counted anchors that are not finite while their logits are.

    Raises:
        ValueError: With what to mind.
    """
    if not bool((losses.isfinite() | ~counted).all()) and not bool(logits.isnan().any()):
        raise ValueError(
            "form returned a value that is not finite from finite cosines: mind an anchor's own logit, which is -inf, "
            "and anchors without a negative."
        )
