"""What crosses devices: embeddings, ids and counts. Without a process group what sends is the identity."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def world_size() -> int:
    """Number of processes in the group; 1 without a group."""
    return dist.get_world_size() if _has_group() else 1


def rank() -> int:
    """Place of this process in the group; 0 without a group."""
    return dist.get_rank() if _has_group() else 0


def gather_with_gradient(rows: Tensor) -> Tensor:
    """Stack the rows of every process, in order of rank, so that gradients find their way home.

    The backward pass sums what all processes say of a row and hands it to the process that the row came from.

    Args:
        rows: (R, …), of the same shape on every process.

    Returns:
        (R × devices, …); ``rows`` itself without a process group.
    """
    if not _has_group():
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered


def gather(rows: Tensor) -> Tensor:
    """Stack the rows of every process, in order of rank, without gradient: (R, …) → (R × devices, …)."""
    if not _has_group():
        return rows
    rows = rows.contiguous()
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def sum_over_devices(value: Tensor) -> Tensor:
    """Sum of a tensor over all processes, without gradient; the tensor itself is left as it is."""
    if not _has_group():
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def gather_objects(value: T) -> list[T]:
    """What every process gives, in order of rank; any Python object that pickles, for words rather than numbers."""
    if not _has_group():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def is_sharded(network: nn.Module) -> bool:
    """Whether FSDP keeps parts of the weights on other devices, so that no device alone can save or call a part of it.

    >>> is_sharded(nn.Linear(2, 2))
    False
    """
    if "torch.distributed.fsdp" not in sys.modules:  # whose import takes a second
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    return any(isinstance(part, FullyShardedDataParallel) for part in network.modules()) or any(
        isinstance(parameter, DTensor) for parameter in network.parameters()
    )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        return gather(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = sum_over_devices(gradient.contiguous())
        start = rank() * ctx.num_rows
        return total[start : start + ctx.num_rows]


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()
