"""Multi-label kNN beside the pre-training: how good the features are, without anything that learns."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from mlssl.data.batches import check_image_batch
from mlssl.distributed import is_sharded
from mlssl.evaluation.features import image_features
from mlssl.evaluation.metrics import MultiLabelScores
from mlssl.evaluation.neighbors import NUM_NEIGHBORS, TEMPERATURE, check_temperature, knn_scores
from mlssl.modes import eval_mode


class OnlineKNN(L.Callback):
    """Score the validation images every ``every_n_epochs`` epochs by the labels of their nearest labelled images.

    The bank holds features of whole images, in float16 on the CPU: those of ``trainer.datamodule.probe_dataloader()``
    where there is such a set, else those of ``trainer.datamodule.image_dataloader("train")``. The network is in eval
    mode and frozen meanwhile, and no random state moves, so the pre-trained weights are the same with and without it.
    Nothing is kept from one validation to the next, and nothing is in the checkpoint.

    Logs ``knn/mAP``, mean average precision in 0–1 over the classes with a positive, see
    `mlssl.evaluation.neighbors.knn_scores`. An image of the bank is not its own neighbour, by its id, where both sets
    are one. On several devices each scores its share of the validation images against the whole bank, and images that
    the sampler repeats count once. Where labels or loaders are missing, or FSDP shards the network, one line says so.

    It costs a pass over the bank's images, without gradient, each time: that is why ``mlssl fit`` does not have it
    unless it is asked for.

    Args:
        k: Neighbours that vote, at least 1.
        temperature: τ > 0 of their weights exp(cosine / τ).
        every_n_epochs: At least 1.
        max_images: Of the bank, at least k; more are left out, evenly spread. 100,000 of 2048 features take 400 MB.

    Raises:
        ValueError: On a setting out of range; during the run, if the bank has less than k images or other labels than
            the validation images.
    """

    def __init__(
        self,
        k: int = NUM_NEIGHBORS,
        temperature: float = TEMPERATURE,
        every_n_epochs: int = 10,
        max_images: int = 100_000,
    ) -> None:
        for name, value in {"k": k, "every_n_epochs": every_n_epochs}.items():
            if value < 1:
                raise ValueError(f"{name}={value} was given: pass at least 1.")
        check_temperature(temperature)
        if max_images < k:
            raise ValueError(f"max_images={max_images} was given: pass at least k={k}.")
        self.k = k
        self.temperature = temperature
        self.every_n_epochs = every_n_epochs
        self.max_images = max_images
        self._bank: tuple[Tensor, Tensor, Tensor] | None = None
        self._metric: MultiLabelScores | None = None
        self._said: set[str] = set()

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the features of the bank, where it is time."""
        self._bank, self._metric = None, None
        due = trainer.state.fn != TrainerFn.FITTING or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if trainer.sanity_checking or not due:
            return None
        loader = _bank_loader(trainer)
        if loader is None or not (hasattr(pl_module, "backbone") and hasattr(pl_module, "normalize")):
            return self._say(
                "the run has no datamodule with whole images, or no backbone to see them, so there is no kNN."
            )
        if is_sharded(trainer.strategy.model or pl_module):
            return self._say("FSDP shards the network, and no device has all of it, so there is no kNN.")
        with isolate_rng():
            self._bank = self._features(loader, pl_module)
        if self._bank is None:
            self._say("the images of the bank have no labels, so there is no kNN.")
        return None

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
        if self._bank is None or dataloader_idx > 0:
            return None
        if not isinstance(outputs, dict) or not {"features", "labels"} <= outputs.keys():
            return self._say("the validation step returns no features with labels, so there is no knn/mAP.")
        bank, bank_labels, bank_ids = self._bank
        features, labels = outputs["features"].float(), outputs["labels"]
        if labels.shape[1] != bank_labels.shape[1]:
            raise ValueError(
                f"The bank has {bank_labels.shape[1]} labels, and the validation images have {labels.shape[1]}: "
                "give both sets the same classes in the same order."
            )
        ids = outputs["image_ids"] if self._shares_images(trainer) else None
        scores = knn_scores(
            features,
            bank,
            bank_labels,
            self.k,
            temperature=self.temperature,
            query_ids=ids,
            bank_ids=None if ids is None else bank_ids,
        )
        if self._metric is None:
            self._metric = MultiLabelScores().to(features.device)
        # A share of weights may pass 1 by a rounding error.
        self._metric.update(scores.clamp(0, 1), labels, outputs["image_ids"])
        return None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the mean average precision over all devices, and let the bank go."""
        metric, self._bank, self._metric = self._metric, None, None
        if metric is None:
            return None
        scores = metric.compute()
        if scores["classes"] == 0:
            return self._say("no label is known to be present in a validation image, so there is no knn/mAP.")
        pl_module.log("knn/mAP", scores["mAP"], prog_bar=True, sync_dist=True)
        return None

    def _features(self, loader: Any, pl_module: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        """Features (M, D) float16, labels (M, L) and ids (M,) of the bank on the CPU; None without labels."""
        total = len(loader.dataset)
        every = -(-total // self.max_images)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        seen = 0
        for batch in loader:
            if not parts:
                check_image_batch(batch)
            if "labels" not in batch:
                return None
            keep = (torch.arange(seen, seen + len(batch["image"])) % every) == 0
            seen += len(batch["image"])
            if keep.any():
                with eval_mode(pl_module.backbone):
                    features = image_features(pl_module.backbone, pl_module.normalize, batch["image"][keep])
                # Normalised first, so that float16 holds features of any scale.
                parts.append(
                    (F.normalize(features).cpu().half(), batch["labels"][keep].to(torch.int8), batch["image_ids"][keep])
                )
        bank, labels, ids = (torch.cat(part) for part in zip(*parts, strict=True))
        return bank, labels, ids

    def _shares_images(self, trainer: L.Trainer) -> bool:
        """Whether the bank's images are those of the validation set, by their files."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        bank = getattr(datamodule, "probe_records", None) or getattr(datamodule, "train_records", None)
        return bank is not None and bank is getattr(datamodule, "val_records", None)

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            rank_zero_info(f"OnlineKNN: {what}")


def _bank_loader(trainer: L.Trainer) -> Any:
    """Labelled whole images, all of them on every device; None where the datamodule has none."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    make_own = getattr(datamodule, "probe_dataloader", None)
    own = make_own() if make_own is not None else None
    if own is not None:
        return own
    make = getattr(datamodule, "image_dataloader", None)
    return make("train") if make is not None else None
