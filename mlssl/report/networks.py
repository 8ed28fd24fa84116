"""The trained and the initial network of a run, without importing the module class that trained it."""

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
    """A backbone with the library's projector, or the identity if the run had another projector or none."""

    def __init__(self, backbone: nn.Module, projector: nn.Module, mean: Any = None, std: Any = None) -> None:
        super().__init__(backbone, mean, std)
        self.projector = projector

    @property
    def has_projector(self) -> bool:
        """Whether views are compared by projections, as in the loss, rather than by features."""
        return not isinstance(self.projector, nn.Identity)


def network_at_end(checkpoint: Mapping[str, Any], path: Path) -> Network:
    """Backbone and projector of a checkpoint.

    Raises:
        ValueError: See `backbone_of`.
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
    """A new network of a checkpoint's architecture, initialised with a seed: first the backbone, then the projector.

    `MultiLabelSSLModule` builds them in the same order, so for the library's class this is the run's initial network.
    The global random state does not change.

    Args:
        checkpoint: Output of `load_checkpoint`.
        path: Its path, for messages.
        seed: Seed of the run.
        arguments: The run's backbone arguments, including those that load published weights; None builds the
            architecture without weights.
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
    """The library's projector with the width of these weights."""
    first = weights.get("0.weight")
    return nn.Identity() if first is None or first.ndim != 2 else heads.projector(features, len(first))
