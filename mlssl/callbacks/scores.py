"""What the online probe and the online kNN share: the mean average precision on the whole validation images."""

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

    Of several validation loaders the first counts, and images that a distributed sampler repeats count once.
    """

    kind: ClassVar[str]
    """First part of the metrics' names."""

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
        """Forget the scores of the validation before."""
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
        # The step has the backbone's features already; those of another network take a pass over the batch.
        given, needed = (outputs, "features") if self.is_of_backbone else (batch, "image")
        name = self.metric(f"{self.kind}/mAP")
        if not isinstance(given, Mapping) or needed not in given:
            return self.say(f"the validation step returns no features, so there is no {name}.")
        if "labels" not in given:
            return self.say(f"the validation images have no labels, so there is no {name}.")
        seen, labels, image_ids = given[needed], given["labels"], given["image_ids"]
        features = seen.float() if self.is_of_backbone else self.features_of_images(pl_module, seen)
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
