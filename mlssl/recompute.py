"""Large batches in little memory: embed in parts, once for the loss and once more for the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlssl.private import BatchNorm

Rows = TypeVar("Rows", bound=tuple[Any, ...])


def in_parts(network: nn.Module, embed: Callable[[Tensor], Rows], views: Tensor, most: int | None) -> Rows:
    """Embed views part by part and keep only the embeddings; the backward pass embeds the views again.

    The gradient is that of the whole batch, like GradCache (L. Gao et al., arXiv 2101.06983), for one more forward
    pass. Batch norms use the statistics of each part; the second pass does not update their running statistics.

    Args:
        network: Network used by `embed`.
        embed: Function from views (n, …) to embeddings, a named tuple of (n, …).
        views: (N, …), N ≥ 1.
        most: Views ≥ 1 per part; part sizes differ by at most one. None, or at least N: all at once.

    Returns:
        The embeddings (N, …).
    """
    if most is None or len(views) <= most:
        return embed(views)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _kept_statistics(network)

    parts = [
        checkpoint(embed, part, use_reentrant=False, context_fn=contexts)
        for part in views.tensor_split(math.ceil(len(views) / most))
    ]
    return type(parts[0])(*(torch.cat(column) for column in zip(*parts, strict=True)))


@contextmanager
def _kept_statistics(network: nn.Module) -> Iterator[None]:
    layers = [layer for layer in network.modules() if isinstance(layer, BatchNorm) and layer.training]
    before = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
        layer.num_batches_tracked = None if layer.num_batches_tracked is None else layer.num_batches_tracked.clone()
    try:
        yield
    finally:
        for layer, (momentum, number) in zip(layers, before, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, number
