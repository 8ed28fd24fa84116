"""Shared by the online probe and the online kNN: mean average precision on the whole validation images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import lightning as L
from torch import Tensor

from mlssl.callbacks.networks import NetworkCallback
from mlssl.evaluation.metrics import MultiLabelScores


class OnlineScores(NetworkCallback, ABC):
    """Score each validation batch by `probabilities`; log the mAP over all devices and its number of classes.

    Only the first validation loader is scored, and images that a distributed sampler repeats count once.
    """

    kind: ClassVar[str]
    """Prefix of the metric names."""

    def __init__(self, network: str) -> None:
        super().__init__(network)
        self._metric: MultiLabelScores | None = None

    def is_due(self) -> bool:
        """Whether this validation is scored."""
        return True

    @abstractmethod
    def probabilities(self, trainer: L.Trainer, features: Tensor, labels: Tensor, image_ids: Tensor) -> Tensor | None:
        """Probabilities (B, L) of features (B, D) with labels (B, L); None if there is nothing to score with."""

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the scores of the previous validation."""
        self._metric = None

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score a batch of whole images."""
        if trainer.sanity_checking or dataloader_idx > 0 or not self.is_due():
            return None
        # The step returns the backbone's features; those of another network need a forward pass on the batch.
        source, needed = (outputs, "features") if self.is_of_backbone else (batch, "image")
        name = self.metric(f"{self.kind}/mAP")
        if not isinstance(source, Mapping) or needed not in source:
            return self.say(f"the validation step returns no features, so there is no {name}.")
        if "labels" not in source:
            return self.say(f"the validation images have no labels, so there is no {name}.")
        inputs, labels, image_ids = source[needed], source["labels"], source["image_ids"]
        features = inputs.float() if self.is_of_backbone else self.features_of_images(pl_module, inputs)
        probabilities = self.probabilities(trainer, features, labels, image_ids)
        if probabilities is None:
            return None
        if self._metric is None:
            self._metric = MultiLabelScores().to(features.device)
        self._metric.update(probabilities, labels, image_ids)
        return None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the mean average precision over all devices."""
        metric, self._metric = self._metric, None
        if metric is None:
            return
        scores, name = metric.compute(), self.metric(f"{self.kind}/mAP")
        if scores["classes"] == 0:
            self.say(f"no label is known to be present in a validation image, so there is no {name}.")
            return
        # All devices have the same numbers; sync_dist only informs Lightning that they agree.
        pl_module.log(name, scores["mAP"], prog_bar=True, sync_dist=True)
        pl_module.log(self.metric(f"{self.kind}/classes"), scores["classes"], sync_dist=True)
