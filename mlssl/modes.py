"""Set a network to eval or training mode temporarily."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Run without gradients and with every module of `network` in eval mode; restore all training flags afterwards."""
    with torch.no_grad(), _flags_kept(network):
        network.eval()
        yield


@contextmanager
def training_mode(network: nn.Module) -> Iterator[None]:
    """Run without gradients and with every module in training mode; restore flags, buffers and random state."""
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    devices = {buffer.device for buffer, _ in buffers if buffer.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(devices), _flags_kept(network):
        network.train()
        try:
            yield
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)


@contextmanager
def _flags_kept(network: nn.Module) -> Iterator[None]:
    flags = {module: module.training for module in network.modules()}
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
