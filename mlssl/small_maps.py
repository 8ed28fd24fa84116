"""Convolutions onto maps of a few places, as matrix products, which a processor is several times faster at.

The last stage of a ResNet makes maps of 2 × 2 of a view of 64 × 64. A convolution with a kernel of 3 × 3 and padding
computes nine products for each of these places, five of them with padding.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_PLACES = {torch.bfloat16: 9, torch.float32: 4, torch.float64: 4}
"""Places of a map up to which products are faster, as measured (docs/performance.md)."""


def small_maps(device: torch.device) -> AbstractContextManager[Any]:
    """Within this context convolutions of networks on the processor take the faster way where there is one.

    Values and gradients are those of the convolution but for rounding. Only channels-last weights are looked at, as
    they need no copies in another order. On other devices nothing changes.
    """
    return _SmallMaps() if device.type == "cpu" else nullcontext()


class _SmallMaps(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.conv2d and not torch.compiler.is_compiling():  # a compiler plans its own
            return _conv2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _conv2d(
    input: Tensor,  # torch's own name, by which it may be given
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    casts = torch.is_autocast_enabled("cpu") and input.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cpu") if casts else input.dtype
    fits = input.dim() == 4 and input.shape[1] == weight.shape[1] and (casts or weight.dtype == dtype)
    plan = None
    if fits and dtype in MOST_PLACES and groups == 1 and _pair(dilation) == (1, 1):
        plan = _plan(input.shape, weight, stride, padding, MOST_PLACES[dtype])
    if plan is None:
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    out: Tensor = _ByPlaces.apply(input.to(dtype), weight, plan)
    return out if bias is None else out + bias.to(dtype).view(-1, 1, 1)


class _Window(NamedTuple):
    """Of a place along one side of a map: what it sees of the input, and with which part of the kernel."""

    place: int
    seen: slice
    kernel: slice


def _plan(
    shape: torch.Size,
    weight: Tensor,
    stride: int | tuple[int, int],
    padding: str | int | tuple[int, int],
    most_places: int,
) -> tuple[list[_Window], list[_Window]] | None:
    """The windows of all rows and of all columns, or None where a convolution is as fast or knows more than this."""
    sides = weight.shape[2:]
    if isinstance(padding, str) or sides == (1, 1) or not weight.is_contiguous(memory_format=torch.channels_last):
        return None
    steps, pads = _pair(stride), _pair(padding)
    counts = [(shape[2 + i] + 2 * pads[i] - sides[i]) // steps[i] + 1 for i in (0, 1)]
    if min(counts) < 1 or counts[0] * counts[1] > most_places or any(pads[i] >= sides[i] for i in (0, 1)):
        return None
    rows, columns = (
        [_window(place, shape[2 + i], sides[i], steps[i], pads[i]) for place in range(counts[i])] for i in (0, 1)
    )
    return rows, columns


def _window(place: int, size: int, side: int, step: int, pad: int) -> _Window:
    start = place * step - pad
    first, end = max(start, 0), min(start + side, size)
    return _Window(place, slice(first, end), slice(first - start, end - start))


class _ByPlaces(torch.autograd.Function):
    """The convolution of a plan: each place is a product of what it sees with the part of the kernel that sees it."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, plan: tuple[list[_Window], list[_Window]]) -> Tensor:
        x, kernels = _channels_last(images, weight)
        out = x.new_empty(len(x), *map(len, plan), len(kernels))
        for row, column in product(*plan):
            seen = x[:, row.seen, column.seen].flatten(1)
            out[:, row.place, column.place] = seen @ kernels[:, row.kernel, column.kernel].flatten(1).T
        ctx.save_for_backward(images, weight)
        ctx.plan = plan
        return out.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        images, weight = ctx.saved_tensors
        of_images, of_weight = ctx.needs_input_grad[:2]
        x, kernels = _channels_last(images, weight)
        gradient = gradient.permute(0, 2, 3, 1)
        sums = torch.promote_types(x.dtype, torch.float32)
        dx = torch.zeros_like(x, dtype=sums) if of_images else None
        dk = torch.zeros_like(kernels, dtype=sums) if of_weight else None
        for row, column in product(*ctx.plan):
            here = gradient[:, row.place, column.place]
            seen, kernel = x[:, row.seen, column.seen], kernels[:, row.kernel, column.kernel]
            if dx is not None:
                dx[:, row.seen, column.seen] += (here @ kernel.flatten(1)).view(seen.shape)
            if dk is not None:
                dk[:, row.kernel, column.kernel] += (here.T @ seen.flatten(1)).view(kernel.shape)
        return (
            None if dx is None else dx.to(images.dtype).permute(0, 3, 1, 2),
            None if dk is None else dk.to(weight.dtype).permute(0, 3, 1, 2),
            None,
        )


def _channels_last(images: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return images.permute(0, 2, 3, 1), weight.to(images.dtype).permute(0, 2, 3, 1)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
