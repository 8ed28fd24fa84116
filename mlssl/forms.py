"""Forms and positives of the image-aware term: plain functions on a chunk of logits, and their names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

Form = Callable[[Tensor, Tensor], Tensor]
"""(logits (c, M), weights (c, M)) -> (c,): the loss of c anchors. Logits are cosines / temperature; an anchor's own
logit is -inf and its own weight 0; positives have a weight above 0."""

Positives = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]
"""(cosines (c, M), same_image (c, M) bool, boxes (c, 4) or None, key_boxes (M, 4) or None) -> weights (c, M) >= 0 of
the keys as positives of c anchors, 0 for "not a positive"; used without gradient."""


def log_of_sum(logits: Tensor, weights: Tensor) -> Tensor:
    """[logsumexp of all - log sum of w exp(logit)] / number of positives: (c, M), (c, M) -> (c,) (arXiv 2506.23156).

    >>> logits, weights = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    >>> torch.equal(log_of_sum(logits, weights), torch.tensor([3.0]).log())
    True
    """
    is_positive = weights > 0
    # Like logsumexp, relative to the largest positive, but without exp(-inf), which is slow on a CPU.
    top = logits.detach().masked_fill(~is_positive, -math.inf).amax(dim=1, keepdim=True)
    exponentials = (logits - top).masked_fill(~is_positive, 0).exp()
    of_positives = top.squeeze(1) + (weights * exponentials).sum(dim=1).log()
    return (logits.logsumexp(dim=1) - of_positives) / is_positive.sum(dim=1)


def mean_of_logs(logits: Tensor, weights: Tensor) -> Tensor:
    """Sum of w (logsumexp of all - logit) / sum of w: (c, M), (c, M) -> (c,) (SupCon, arXiv 2004.11362, eq. 2)."""
    # The own logit is -inf with weight 0, and 0 · -inf is NaN.
    of_positives = (weights * logits.masked_fill(weights == 0, 0)).sum(dim=1)
    return logits.logsumexp(dim=1) - of_positives / weights.sum(dim=1)


def same_image(cosines: Tensor, same_image: Tensor, *_boxes: Tensor | None) -> Tensor:
    """Weight 1 for every other key of the anchor's image, independent of cosines and boxes."""
    return same_image.to(cosines.dtype)


def gated(threshold: float) -> Positives:
    """Weight 1 for the keys of the anchor's image whose cosine reaches the threshold (0.3 in the paper's code).

    Raises:
        ValueError: `threshold` is outside -1–1.
    """
    if not -1 <= threshold <= 1:
        raise ValueError(f"gated({threshold}) was given: pass a cosine in -1–1 that a positive must reach.")
    return _Gated(float(threshold))


def by_overlap(power: float = 1.0) -> Positives:
    """Weight IoU^power of the boxes of two views within an image, 0 across images.

    Disjoint views are not positives of each other; with `power` 0 all views of an image are, with weight 1.

    Raises:
        ValueError: `power` is negative or not finite; or, when called, boxes are missing.
    """
    if not 0 <= power < math.inf:
        raise ValueError(f"by_overlap({power}) was given: pass a power of at least 0.")
    return _ByOverlap(float(power))


@dataclass(frozen=True)
class _Gated:
    threshold: float

    def __call__(self, cosines: Tensor, same_image: Tensor, *_boxes: Tensor | None) -> Tensor:
        return (same_image & (cosines >= self.threshold)).to(cosines.dtype)

    def __str__(self) -> str:
        return f"gated({self.threshold})"


@dataclass(frozen=True)
class _ByOverlap:
    power: float

    def __call__(self, cosines: Tensor, same_image: Tensor, boxes: Tensor | None, key_boxes: Tensor | None) -> Tensor:
        if boxes is None or key_boxes is None:
            raise ValueError(
                f"{self} compares the boxes of two views, but no boxes were given: pass boxes=batch['boxes'] (batches "
                "of MultiLabelDataModule have them), and key_boxes with keys."
            )
        return _iou(boxes.to(cosines), key_boxes.to(cosines)).pow(self.power) * same_image

    def __str__(self) -> str:
        return f"by_overlap({self.power})"


def form_of(value: str | Form) -> Form:
    """Resolve a setting to a form.

    Args:
        value: ``log_of_sum``, ``mean_of_logs``, or a function, which is returned unchanged.

    Raises:
        ValueError: The name is unknown (suggests the nearest), or is a checkpoint's text for a custom function.
        TypeError: Anything else.

    >>> form_of("mean_of_logs") is mean_of_logs
    True
    """
    form: Form = _named("form", value, _FORMS, {})
    return form


def positives_of(value: str | Positives) -> Positives:
    """Resolve a setting to positives.

    Args:
        value: ``same_image``, ``gated(<number>)``, ``by_overlap(<number>)``, or a function, which is returned
            unchanged.

    Raises:
        ValueError: The name is unknown (suggests the nearest), a number is out of range, or it is a checkpoint's text
            for a custom function.
        TypeError: Anything else.

    >>> positives_of("gated(0.3)") == gated(0.3)
    True
    """
    positives: Positives = _named("positives", value, _POSITIVES, _POSITIVES_OF_A_NUMBER)
    return positives


def plain_setting(value: str | Callable[..., Tensor]) -> str:
    """Text of a form or of positives in hyper-parameters: a name, or "custom" and an import path.

    >>> plain_setting(gated(0.3)), plain_setting(same_image), plain_setting(torch.nn.functional.normalize)
    ('gated(0.3)', 'same_image', 'custom torch.nn.functional.normalize')
    """
    if isinstance(value, str | _Gated | _ByOverlap):
        return str(value)
    for name, function in {**_FORMS, **_POSITIVES}.items():
        if value is function:
            return name
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{_CUSTOM}{named.__module__}.{named.__qualname__}"


_OfANumber = dict[str, tuple[Callable[[float], Positives], float]]  # with an example of the number

_FORMS: dict[str, Form] = {"log_of_sum": log_of_sum, "mean_of_logs": mean_of_logs}
_POSITIVES: dict[str, Positives] = {"same_image": same_image}
_POSITIVES_OF_A_NUMBER: _OfANumber = {"gated": (gated, 0.3), "by_overlap": (by_overlap, 1.0)}
_CUSTOM = "custom "
_CALL = re.compile(r"(\w+)\((.*)\)")


def _named(argument: str, value: Any, functions: dict[str, Any], of_a_number: _OfANumber) -> Any:
    if callable(value):
        return value
    if not isinstance(value, str):
        raise TypeError(f"{argument}={value!r} was given: pass a name or a function.")
    if value.startswith(_CUSTOM):
        raise ValueError(
            f"{argument}={value!r} was given: the checkpoint only stores the import path of the {argument} "
            f"{value.removeprefix(_CUSTOM)!r}, which is never imported: pass the function again, "
            f"load_from_checkpoint(path, {argument}=…)."
        )
    if value in functions:
        return functions[value]
    call = _CALL.fullmatch(value)
    if call and call[1] in of_a_number and (number := _number(call[2])) is not None:
        return of_a_number[call[1]][0](number)
    known = [*functions, *(f"{name}({example})" for name, (_, example) in of_a_number.items())]
    nearest = get_close_matches(value, known, n=1, cutoff=0.5)
    meant = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise ValueError(
        f"{argument}={value!r} is unknown: {meant}Pass {', '.join(map(repr, known))}, or a function (mlssl.forms)."
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union (c, M) of boxes (c, 4) and (M, 4): top, left, height, width; 0 for two empty ones."""
    intersection = boxes.new_ones(())
    for start in (0, 1):
        first, second = boxes[:, None, start], others[None, :, start]
        end = torch.minimum(first + boxes[:, None, start + 2], second + others[None, :, start + 2])
        intersection = intersection * (end - torch.maximum(first, second)).clamp(min=0)
    areas = (boxes[:, 2] * boxes[:, 3])[:, None] + (others[:, 2] * others[:, 3])[None, :]
    return intersection / (areas - intersection).clamp(min=torch.finfo(areas.dtype).tiny)
