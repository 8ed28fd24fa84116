"""Layers of a backbone in their order: learning rates that rise with depth, and first stages that stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def depth_of_parameters(backbone: nn.Module, *, coarse: bool = False) -> dict[str, int]:
    """Name of each parameter → number of its layer from the input, from 0 on, as timm groups them.

    Args:
        backbone: A network of timm's.
        coarse: Count stages (the stem is the first; in a transformer each block is one) in place of blocks.

    Raises:
        ValueError: If the network does not tell its layers, as torchvision's and custom ones.
    """
    matcher: Any = getattr(backbone, "group_matcher", None)
    if matcher is None:
        raise ValueError(
            f"{type(backbone).__name__} does not tell its layers: give a backbone of timm by its name, or leave "
            "layer_decay and frozen_stages out."
        )
    from timm.models import group_parameters  # takes over a second

    found: dict[str, int] = group_parameters(backbone, matcher(coarse=coarse), reverse=True)
    return found


def rate_scales(depths: Mapping[str, int], layer_decay: float) -> dict[str, float]:
    """Name of each parameter → factor of its learning rate, layer_decay per layer between it and the heads.

    As in BEiT (H. Bao et al., arXiv 2106.08254) and `timm.optim.param_groups_layer_decay`, where the heads have the
    whole rate.

    >>> rate_scales({"stem": 0, "block": 1}, 0.5)
    {'stem': 0.25, 'block': 0.5}
    """
    number = max(depths.values()) + 1
    return {name: layer_decay ** (number - depth) for name, depth in depths.items()}


class FrozenStages(nn.Module):
    """The first stages of a backbone, which are held as they are: weights, and statistics of norms.

    It is set after the backbone in a module, so that `train` of that module reaches it last. It has no weights of its
    own: those of the stages stay the backbone's.

    Args:
        backbone: A network of timm's.
        stages: How many, at least 1; the stem is the first.
        epochs: First epochs that they are held for; 0: always, and then their weights get no gradient.

    Raises:
        ValueError: If there are fewer, or the network does not tell its layers.
    """

    def __init__(self, backbone: nn.Module, stages: int, epochs: int = 0) -> None:
        super().__init__()
        depths = depth_of_parameters(backbone, coarse=True)
        number = max(depths.values()) + 1
        if stages > number:
            raise ValueError(
                f"frozen_stages={stages} was given, and {type(backbone).__name__} has {number}: pass fewer."
            )
        self.epochs = epochs
        self.is_held = True
        self.names = {name for name, depth in depths.items() if depth < stages}
        own = dict(backbone.named_parameters())
        frozen = {id(own[name]) for name in self.names}
        for name in () if epochs else self.names:
            own[name].requires_grad_(False)
        self._parts = [  # a list, whose members stay the backbone's
            part
            for part in backbone.modules()
            if (inside := [id(parameter) for parameter in part.parameters()]) and frozen.issuperset(inside)
        ]

    def begin_epoch(self, epoch: int) -> None:
        """Let the stages go once they were held for as many epochs as they should be."""
        self.is_held = not self.epochs or epoch < self.epochs
        self.train(self.training)

    def train(self, mode: bool = True) -> FrozenStages:
        """Keep norms from the statistics of batches, and dropout from dropping, as long as the stages are held."""
        super().train(mode)
        for part in self._parts:
            part.train(mode and not self.is_held)
        return self
