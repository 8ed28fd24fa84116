"""Shared by callbacks that evaluate one network of a module: its name, features, metric names and one-line notices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from mlssl.contracts import EvaluationData, FeatureNetwork
from mlssl.distributed import is_sharded
from mlssl.evaluation.features import image_features
from mlssl.modes import eval_mode
from mlssl.weights.checkpoints import nearest_network

BACKBONE = "backbone"


class NetworkCallback(L.Callback):
    """A callback that evaluates the backbone, or another submodule from normalised images to features.

    Another network than the backbone has its own state in the checkpoint and its own metrics, such as
    ``probe/teacher/mAP``.

    Args:
        network: Name of the submodule for ``module.get_submodule``: ``teacher``, ``teacher.module.0``.

    Raises:
        ValueError: If the name is empty; before the run, if the module has no such submodule (names the nearest).
        TypeError: Before the run, if the module has no ``normalize``.
    """

    def __init__(self, network: str = BACKBONE) -> None:
        if not network:
            raise ValueError("network='' was given: pass the name of a submodule, such as 'backbone' or 'teacher'.")
        self.network = network
        self._printed: set[str] = set()

    @property
    def state_key(self) -> str:
        """Name of the callback's state in the checkpoint."""
        return super().state_key if self.is_of_backbone else f"{super().state_key}({self.network})"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the network exists; each callback handles a module without a backbone."""
        if self.is_of_backbone:
            return
        owner = type(pl_module).__name__
        try:
            pl_module.get_submodule(self.network)
        except AttributeError:
            names = [name for name, _ in pl_module.named_parameters()]
            raise ValueError(
                f"{type(self).__name__}(network={self.network!r}): {owner} has no such submodule: "
                f"{nearest_network(self.network, names)}"
            ) from None
        if self.network_of(pl_module) is None:
            raise TypeError(
                f"{type(self).__name__}(network={self.network!r}): {owner} has no `normalize` for the network's "
                "images: use MultiLabelSSLModule, or add a method of that name."
            )

    @property
    def is_of_backbone(self) -> bool:
        """Whether the network is the backbone: the step returns its features."""
        return self.network == BACKBONE

    def network_of(self, pl_module: L.LightningModule) -> FeatureNetwork | None:
        """The network and the module's normalisation; None if the module lacks either."""
        try:
            network = pl_module.get_submodule(self.network)
        except AttributeError:
            return None
        normalize = getattr(pl_module, "normalize", None)
        return _Network(network, normalize) if callable(normalize) else None

    def metric(self, name: str) -> str:
        """Name of a metric such as ``probe/mAP``; it includes the network if that is not the backbone."""
        kind, rest = name.split("/", 1)
        return name if self.is_of_backbone else f"{kind}/{self.network}/{rest}"

    def say(self, what: str) -> None:
        """Print a line on rank 0, once per callback."""
        if what not in self._printed:
            self._printed.add(what)
            suffix = "" if self.is_of_backbone else f" of {self.network}"
            rank_zero_info(f"{type(self).__name__}{suffix}: {what}")

    def refuse_shards(self, trainer: L.Trainer, pl_module: L.LightningModule, why: str, remedy: str) -> None:
        """Refuse FSDP, under which no device can call the submodule alone.

        Raises:
            TypeError: With the reason and the remedy.
        """
        if is_sharded(trainer.strategy.model or pl_module):
            raise TypeError(
                f"{why}, but FSDP shards the network, and no device has all of it: {remedy}, or train under DDP."
            )

    def features_of_views(self, trainer: L.Trainer, pl_module: L.LightningModule, views: Tensor) -> Tensor:
        """Features (B, A, K, D) of views (B, A, K, C, S, S): one pass per branch, in the precision of the run.

        The network is in eval mode meanwhile; buffers and random state do not change.

        Raises:
            ValueError: If the network does not return features (n, D).
        """
        network = self.network_of(pl_module)
        assert network is not None  # checked by setup
        with isolate_rng(), eval_mode(network.backbone), trainer.precision_plugin.forward_context():
            branches = [network.backbone(network.normalize(branch.flatten(0, 1))) for branch in views.unbind(1)]
        self._check_features(branches[0])
        return torch.stack([features.view(len(views), views.shape[2], -1) for features in branches], dim=1)

    def features_of_images(self, pl_module: L.LightningModule, images: Tensor) -> Tensor:
        """Features (n, D) float32 of whole images uint8 (n, C, H, W); nothing of the network or the run changes.

        Raises:
            ValueError: If the network does not return features (n, D).
        """
        network = self.network_of(pl_module)
        assert network is not None  # checked by setup
        with isolate_rng(), eval_mode(network.backbone):
            features = image_features(network.backbone, network.normalize, images)
        self._check_features(features)
        return features

    def _check_features(self, features: Any) -> None:
        if not isinstance(features, Tensor) or features.ndim != 2:
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"{type(self).__name__}(network={self.network!r}): the submodule returns {found}: pass the name of one "
                "that maps images (n, C, H, W) to features (n, D)."
            )


def evaluation_data(trainer: L.Trainer) -> EvaluationData | None:
    """The run's datamodule, or None if callbacks cannot evaluate on it."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return data if isinstance(data, EvaluationData) else None


def batch_size_of(trainer: L.Trainer) -> int:
    """Images per step on this device, from the train loader; 32 if it has no batch size."""
    size = getattr(trainer.train_dataloader, "batch_size", None)
    return size if isinstance(size, int) else 32


def workers_of(trainer: L.Trainer) -> int:
    """Loader processes of the run."""
    return getattr(trainer.train_dataloader, "num_workers", 0)


@dataclass
class _Network:
    backbone: nn.Module
    normalize: Callable[[Tensor], Tensor]
