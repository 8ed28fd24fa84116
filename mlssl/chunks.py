"""Sum a loss over anchors, with its count and gradient, one chunk of anchors at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**21
"""Default number of cosines computed at a time: 8 MB in float32. A form needs about ten such matrices."""

OfChunk = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor, Tensor | None]]
"""(cosines (c, M), rows of the c anchors, whether to compute a gradient) -> (sum, count, gradient (c, M) or None)."""


def sum_over_chunks(
    of_chunk: OfChunk, anchors: Tensor, keys: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    """Sum `of_chunk` over all anchors without storing the cosines.

    The gradient is computed together with the value: beyond the gradient and a normalised copy of the features, memory
    is that of one chunk. Second derivatives are not supported.

    Args:
        of_chunk: Returns sum and count of a chunk, and the sum's gradient with respect to its cosines.
        anchors: Features (R, P).
        keys: Features (M, P), or None for the anchors.
        chunk_size: Anchors per chunk; None: chunks of `CHUNK_ELEMENTS` cosines.

    Returns:
        The sum, a scalar in at least float32, and the count, an integer scalar without gradient.
    """
    step = chunk_size or max(1, CHUNK_ELEMENTS // max(1, len(anchors if keys is None else keys)))
    total, count = _SumOverChunks.apply(anchors, keys, of_chunk, step, torch.is_grad_enabled())
    return total, count


def unit_rows(features: Tensor) -> Tensor:
    """Scale rows (R, P) to unit norm, in at least float32; a zero row stays zero and gets no gradient."""
    wide = features if features.dtype == torch.float64 else features.float()
    # A zero row has no direction: normalize would divide its gradient by its eps of 1e-12.
    return F.normalize(wide, dim=1).masked_fill((wide == 0).all(dim=1, keepdim=True), 0)


class _SumOverChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, keys: Tensor | None, of_chunk: OfChunk, step: int, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        to_anchors, to_keys = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        units = unit_rows(anchors)
        key_units = units if keys is None else unit_rows(keys)
        gradient = torch.zeros_like(units) if to_anchors else None
        key_gradient = torch.zeros_like(key_units) if to_keys else None
        into_keys = gradient if keys is None else key_gradient  # one gradient for an anchor's two roles
        total, count = units.new_zeros(()), torch.zeros((), dtype=torch.long, device=units.device)
        with _without_autocast(units.device.type):
            for start in range(0, len(units) if len(key_units) else 0, step):
                rows = slice(start, start + step)
                part, number, slope = of_chunk(units[rows] @ key_units.T, rows, to_anchors or to_keys)
                total, count = total + part, count + number
                if slope is not None and gradient is not None:
                    gradient[rows].addmm_(slope, key_units)
                if slope is not None and into_keys is not None:
                    into_keys.addmm_(slope.T, units[rows])
        ctx.save_for_backward(_through_unit_rows(gradient, anchors), _through_unit_rows(key_gradient, keys))
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor, _of_count: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if one is None else one * of_total for one in ctx.saved_tensors), None, None, None


def _through_unit_rows(gradient: Tensor | None, features: Tensor | None) -> Tensor | None:
    """Convert the gradient with respect to unit rows to one with respect to features, in place, chunk by chunk."""
    if gradient is None or features is None:
        return None
    step = max(1, CHUNK_ELEMENTS // max(1, features.shape[1]))
    for start in range(0, len(features), step):
        rows = slice(start, start + step)
        with torch.enable_grad():
            part = features[rows].detach().to(gradient.dtype).requires_grad_()
            gradient[rows] = torch.autograd.grad(unit_rows(part), part, gradient[rows])[0]
    return gradient


def _without_autocast(device: str) -> torch.autocast | nullcontext[None]:
    """Disable autocast, which would round the products to bfloat16; devices such as ``meta`` have none."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
