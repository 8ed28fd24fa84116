"""The network of a run at its end and at its start, without the class that trained it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlssl import heads
from mlssl.backbones import build_backbone, feature_width, rebuild_backbone
from mlssl.weights.checkpoints import architecture, misfit, weights_of
from mlssl.weights.sources import Backbone, backbone_of


class Network(Backbone):
    """A backbone and the library's projector behind it; the identity where the run had another one or none."""

    def __init__(self, backbone: nn.Module, projector: nn.Module, mean: Any = None, std: Any = None) -> None:
        super().__init__(backbone, mean, std)
        self.projector = projector

    @property
    def has_projector(self) -> bool:
        """Whether views are judged by projections, as the loss does, and not by features."""
        return not isinstance(self.projector, nn.Identity)


def network_at_end(checkpoint: Mapping[str, Any], path: Path) -> Network:
    """Backbone and projector of a checkpoint.

    Raises:
        ValueError: As `backbone_of`.
    """
    opened = backbone_of(checkpoint, path)
    weights = weights_of(checkpoint, "projector")
    projector = _projector(feature_width(opened.backbone), weights)
    if weights and not misfit(projector, weights):
        projector.load_state_dict(weights)
    else:
        projector = nn.Identity()
    return Network(opened.backbone, projector, opened.mean, opened.std)


def network_at_start(
    checkpoint: Mapping[str, Any], path: Path, seed: int, arguments: Mapping[str, Any] | None = None
) -> Network:
    """A new network of the architecture of a checkpoint, built under a seed: first the backbone, then the projector.

    In this order the constructor of `MultiLabelSSLModule` builds them, so for the library's class this is what the run
    began with. The global random state stays as it is.

    Args:
        checkpoint: Of `load_checkpoint`.
        path: For messages.
        seed: Of the run.
        arguments: Of the backbone as the run had them, with those that load published weights; None builds the
            architecture of the checkpoint without any weights.
    """
    name, own_arguments, mean, std = architecture(checkpoint, path)
    weights = weights_of(checkpoint, "projector")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build, settings = (rebuild_backbone, own_arguments) if arguments is None else (build_backbone, arguments)
        backbone = build(name, **settings)
        projector = _projector(feature_width(backbone), weights)
    fits = weights and not misfit(projector, weights)
    return Network(backbone, projector if fits else nn.Identity(), mean, std)


def _projector(features: int, weights: Mapping[str, Tensor]) -> nn.Module:
    """The library's projector, as wide as that of the weights."""
    first = weights.get("0.weight")
    return nn.Identity() if first is None or first.ndim != 2 else heads.projector(features, len(first))
