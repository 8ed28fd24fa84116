"""Convolutions with outputs of a few pixels as matrix products, which are several times faster on a CPU.

The last stage of a ResNet outputs maps of 2 × 2 pixels for views of 64 × 64. A padded 3 × 3 convolution computes nine
products for each of these pixels, five of them with padding.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_PIXELS = {torch.bfloat16: 9, torch.float32: 4, torch.float64: 4}
"""Maximum number of output pixels for which products are faster, as measured (docs/callbacks.md)."""


class SmallMaps(L.Callback):
    """Compute the backbone's convolutions with small outputs as matrix products while it trains on a CPU.

    `mlssl fit` adds it if a run has no accelerator. Values and gradients are those of the convolution up to rounding.
    On other devices, in evaluation and with a compiled backbone nothing changes.
    """

    def __init__(self) -> None:
        self._hooks: list[Any] = []
        self._contexts: list[SmallMapProducts] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add hooks around the backbone's forward pass."""
        backbone = getattr(pl_module, "backbone", None)
        if isinstance(backbone, nn.Module) and pl_module.device.type == "cpu" and not getattr(pl_module, "compiles", 0):
            self._hooks = [
                backbone.register_forward_pre_hook(self._enter),
                backbone.register_forward_hook(self._leave, always_call=True),
            ]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove the hooks."""
        for handle in self._hooks:
            handle.remove()
        self._hooks = []

    def _enter(self, backbone: nn.Module, _inputs: Any) -> None:
        if backbone.training:
            self._contexts.append(SmallMapProducts())
            self._contexts[-1].__enter__()  # type: ignore[no-untyped-call]

    def _leave(self, _backbone: nn.Module, _inputs: Any, _output: Any) -> None:
        if self._contexts:
            self._contexts.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


class SmallMapProducts(TorchFunctionMode):
    """Within this context, convolutions on the CPU are matrix products if these are faster.

    Only channels-last weights are handled: they need no copies in another order.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.conv2d and not torch.compiler.is_compiling():
            return _conv2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _conv2d(
    input: Tensor,  # torch's name: it may be given as a keyword
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    casts = torch.is_autocast_enabled("cpu") and input.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cpu") if casts else input.dtype
    fits = (
        input.device.type == "cpu"
        and input.dim() == 4
        and input.shape[1] == weight.shape[1]
        and (casts or weight.dtype == dtype)
    )
    plan = None
    if fits and input.device.type == "cpu" and dtype in MAX_PIXELS and groups == 1 and _pair(dilation) == (1, 1):
        plan = _plan(input.shape, weight, stride, padding, MAX_PIXELS[dtype])
    if plan is None:
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    out: Tensor = _ByPixels.apply(input.to(dtype), weight, plan)
    return out if bias is None else out + bias.to(dtype).view(-1, 1, 1)


class _Window(NamedTuple):
    """For an output index along one side: the slice of the input that it depends on, and that of the kernel."""

    pixel: int
    window: slice
    kernel: slice


def _plan(
    shape: torch.Size,
    weight: Tensor,
    stride: int | tuple[int, int],
    padding: str | int | tuple[int, int],
    max_pixels: int,
) -> tuple[list[_Window], list[_Window]] | None:
    """The windows of all rows and columns; None if torch's convolution is as fast, or the case is not supported."""
    sides = weight.shape[2:]
    if isinstance(padding, str) or sides == (1, 1) or not weight.is_contiguous(memory_format=torch.channels_last):
        return None
    steps, pads = _pair(stride), _pair(padding)
    counts = [(shape[2 + i] + 2 * pads[i] - sides[i]) // steps[i] + 1 for i in (0, 1)]
    if min(counts) < 1 or counts[0] * counts[1] > max_pixels or any(pads[i] >= sides[i] for i in (0, 1)):
        return None
    rows, columns = (
        [_window(index, shape[2 + i], sides[i], steps[i], pads[i]) for index in range(counts[i])] for i in (0, 1)
    )
    return rows, columns


def _window(index: int, size: int, side: int, step: int, pad: int) -> _Window:
    start = index * step - pad
    first, end = max(start, 0), min(start + side, size)
    return _Window(index, slice(first, end), slice(first - start, end - start))


class _ByPixels(torch.autograd.Function):
    """The convolution of a plan: each pixel is the product of an input window with the matching part of the kernel."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, plan: tuple[list[_Window], list[_Window]]) -> Tensor:
        x, kernels = _channels_last(images, weight)
        out = x.new_empty(len(x), *map(len, plan), len(kernels))
        for row, column in product(*plan):
            window = x[:, row.window, column.window].flatten(1)
            out[:, row.pixel, column.pixel] = window @ kernels[:, row.kernel, column.kernel].flatten(1).T
        ctx.save_for_backward(images, weight)
        ctx.plan = plan
        return out.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        images, weight = ctx.saved_tensors
        needs_images, needs_weight = ctx.needs_input_grad[:2]
        x, kernels = _channels_last(images, weight)
        gradient = gradient.permute(0, 2, 3, 1)
        sums = torch.promote_types(x.dtype, torch.float32)
        dx = torch.zeros_like(x, dtype=sums) if needs_images else None
        dk = torch.zeros_like(kernels, dtype=sums) if needs_weight else None
        for row, column in product(*ctx.plan):
            here = gradient[:, row.pixel, column.pixel]
            window, kernel = x[:, row.window, column.window], kernels[:, row.kernel, column.kernel]
            if dx is not None:
                dx[:, row.window, column.window] += (here @ kernel.flatten(1)).view(window.shape)
            if dk is not None:
                dk[:, row.kernel, column.kernel] += (here.T @ window.flatten(1)).view(kernel.shape)
        return (
            None if dx is None else dx.to(images.dtype).permute(0, 3, 1, 2),
            None if dk is None else dk.to(weight.dtype).permute(0, 3, 1, 2),
            None,
        )


def _channels_last(images: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return images.permute(0, 2, 3, 1), weight.to(images.dtype).permute(0, 2, 3, 1)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
