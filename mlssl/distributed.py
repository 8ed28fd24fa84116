"""Communication between processes: embeddings, ids and counts. Without a process group, the identity."""

from __future__ import annotations

import sys
from typing import Any, Optional, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
Group: TypeAlias = Optional["dist.ProcessGroup"]


def world_size(group: Group = None) -> int:
    """Number of processes, in total or in a group; 1 without a process group."""
    return dist.get_world_size(group) if _has_group() else 1


def rank(group: Group = None) -> int:
    """Rank of this process, in total or in a group; 0 without a process group."""
    return dist.get_rank(group) if _has_group() else 0


def group_of(devices: int) -> Group:
    """Split all processes into groups of `devices` consecutive ranks; every process calls this and gets its group.

    Raises:
        ValueError: The number of processes is not a multiple of ``devices``.
    """
    if devices < 1 or world_size() % devices:
        raise ValueError(
            f"{world_size()} devices cannot be split into groups of {devices}: pass a divisor, such as the devices of "
            "one node."
        )
    return dist.new_subgroups(devices)[0] if _has_group() else None


def gather_with_gradient(rows: Tensor, group: Group = None) -> Tensor:
    """All-gather rows in rank order, with gradient.

    The backward pass sums each row's gradient over the processes and returns it to the row's process.

    Args:
        rows: (R, …), the same shape on every process.
        group: Process group; None: all processes.

    Returns:
        (R × devices, …); ``rows`` without a process group.
    """
    if not _has_group():
        return rows
    gathered: Tensor = _Gather.apply(rows, group)
    return gathered


def gather(rows: Tensor, group: Group = None) -> Tensor:
    """All-gather rows (in a group) in rank order, without gradient: (R, …) → (R × devices, …)."""
    if not _has_group():
        return rows
    rows = rows.contiguous()
    parts = [torch.empty_like(rows) for _ in range(world_size(group))]
    dist.all_gather(parts, rows, group=group)
    return torch.cat(parts)


def sum_over_devices(value: Tensor, group: Group = None) -> Tensor:
    """Sum a tensor over all processes (of a group), without gradient; the input is not modified."""
    if not _has_group():
        return value
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def gather_objects(value: T) -> list[T]:
    """All-gather a picklable Python object in rank order."""
    if not _has_group():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def is_sharded(network: nn.Module) -> bool:
    """Whether FSDP keeps parts of the weights on other devices, so that no device alone can save or call a submodule.

    >>> is_sharded(nn.Linear(2, 2))
    False
    """
    if "torch.distributed.fsdp" not in sys.modules:  # importing it takes a second
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    return any(isinstance(part, FullyShardedDataParallel) for part in network.modules()) or any(
        isinstance(parameter, DTensor) for parameter in network.parameters()
    )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        ctx.num_rows, ctx.group = len(rows), group
        return gather(rows, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = sum_over_devices(gradient.contiguous(), ctx.group)
        start = rank(ctx.group) * ctx.num_rows
        return total[start : start + ctx.num_rows], None


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()
