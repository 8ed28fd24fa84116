"""Layers of a backbone in order: layer-wise learning rate decay, and frozen first stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def depth_of_parameters(backbone: nn.Module, *, coarse: bool = False) -> dict[str, int]:
    """Parameter name → layer index from the input, from 0, as grouped by timm.

    Args:
        backbone: A timm network.
        coarse: Count stages (the stem is the first; in a transformer each block is one) instead of blocks.

    Raises:
        ValueError: The network does not define its layers, like torchvision and custom ones.
    """
    matcher: Any = getattr(backbone, "group_matcher", None)
    if matcher is None:
        raise ValueError(
            f"{type(backbone).__name__} does not define its layers: pass a timm backbone by name, or leave layer_decay "
            "and frozen_stages out."
        )
    from timm.models import group_parameters  # takes over a second

    found: dict[str, int] = group_parameters(backbone, matcher(coarse=coarse), reverse=True)
    return found


def rate_scales(depths: Mapping[str, int], layer_decay: float) -> dict[str, float]:
    """Parameter name → learning rate factor, layer_decay per layer between it and the heads.

    As in BEiT (H. Bao et al., arXiv 2106.08254) and `timm.optim.param_groups_layer_decay`; the heads have the full
    rate.

    >>> rate_scales({"stem": 0, "block": 1}, 0.5)
    {'stem': 0.25, 'block': 0.5}
    """
    number = max(depths.values()) + 1
    return {name: layer_decay ** (number - depth) for name, depth in depths.items()}


class FrozenStages(nn.Module):
    """Freeze the first stages of a backbone: weights and norm statistics.

    Set it after the backbone in a module, so that the module's `train` reaches it last. It has no weights; the stages
    stay part of the backbone.

    Args:
        backbone: A timm network.
        stages: Number of frozen stages, at least 1; the stem is the first.
        epochs: Number of epochs to freeze them; 0: always, and their weights get no gradient.

    Raises:
        ValueError: There are fewer stages, or the network does not define its layers.
    """

    def __init__(self, backbone: nn.Module, stages: int, epochs: int = 0) -> None:
        super().__init__()
        depths = depth_of_parameters(backbone, coarse=True)
        number = max(depths.values()) + 1
        if stages > number:
            raise ValueError(
                f"frozen_stages={stages} was given, but {type(backbone).__name__} has {number}: pass fewer."
            )
        self.epochs = epochs
        self.is_held = True
        self.names = {name for name, depth in depths.items() if depth < stages}
        own = dict(backbone.named_parameters())
        frozen = {id(own[name]) for name in self.names}
        for name in () if epochs else self.names:
            own[name].requires_grad_(False)
        self._parts = [  # a plain list, so that they stay submodules of the backbone only
            part
            for part in backbone.modules()
            if (inside := [id(parameter) for parameter in part.parameters()]) and frozen.issuperset(inside)
        ]

    def begin_epoch(self, epoch: int) -> None:
        """Unfreeze the stages after their epochs."""
        self.is_held = not self.epochs or epoch < self.epochs
        self.train(self.training)

    def train(self, mode: bool = True) -> FrozenStages:
        """Set the mode, but keep the frozen stages in eval mode."""
        super().train(mode)
        for part in self._parts:
            part.train(mode and not self.is_held)
        return self
