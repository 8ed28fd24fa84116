"""Online multi-label kNN: feature quality during pre-training, without a trained classifier."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from mlssl.callbacks.networks import BACKBONE, evaluation_data
from mlssl.callbacks.scores import OnlineScores
from mlssl.contracts import EvaluationData
from mlssl.data.batches import check_image_batch
from mlssl.distributed import is_sharded
from mlssl.evaluation.neighbors import NUM_NEIGHBORS, TEMPERATURE, check_temperature, knn_scores


class OnlineKNN(OnlineScores):
    """Score the validation images every ``every_n_epochs`` epochs by kNN on labelled images.

    The bank contains features of whole images, in float16 on the CPU: those of
    ``trainer.datamodule.probe_dataloader()`` if it returns a loader, else those of
    ``trainer.datamodule.image_dataloader("train")``. The network is in eval mode and frozen meanwhile, and no random
    state changes, so the pre-trained weights are the same with and without it. Nothing is kept between validations or
    in the checkpoint.

    Logs ``knn/mAP``, mean average precision in 0–1 over the classes with a positive, see
    `mlssl.evaluation.neighbors.knn_scores`, and ``knn/classes``, their number. If both sets are the same, an image is
    not its own neighbour, by its id. On several devices each scores its share of the validation images
    against the whole bank, and images that the sampler repeats count once. If labels or loaders are missing, or FSDP
    shards the network, one line says so. For another `network` than the backbone it logs ``knn/<network>/mAP`` and so
    on, at the cost of one more forward pass on the validation images.

    Each time it costs a pass over the bank's images, without gradient; therefore ``mlssl fit`` does not add it by
    default.

    Args:
        k: Neighbours that vote, at least 1.
        temperature: τ > 0 of the votes' weights exp(cosine / τ).
        every_n_epochs: At least 1.
        max_images: Maximum size of the bank, at least k; further images are left out, evenly spaced. 100,000 rows of
            2048 features take 400 MB.
        network: Name of the submodule whose features are compared, from normalised images to (n, D).

    Raises:
        ValueError: If a setting is out of range; before the run, if the module has no such network; during the run, if
            the bank has fewer than k images or other labels than the validation images.
        TypeError: If there is another network, and the model has no ``normalize`` for its images.
    """

    kind = "knn"

    def __init__(
        self,
        k: int = NUM_NEIGHBORS,
        temperature: float = TEMPERATURE,
        every_n_epochs: int = 10,
        max_images: int = 100_000,
        network: str = BACKBONE,
    ) -> None:
        super().__init__(network)
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

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compute the features of the bank, if this validation is due."""
        super().on_validation_epoch_start(trainer, pl_module)
        self._bank = None
        due = trainer.state.fn != TrainerFn.FITTING or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if trainer.sanity_checking or not due:
            return None
        data = evaluation_data(trainer)
        if data is None or self.network_of(pl_module) is None:
            return self.say("the run has no datamodule with whole images, or no backbone, so there is no kNN.")
        if is_sharded(trainer.strategy.model or pl_module):
            return self.say("FSDP shards the network, and no device has all of it, so there is no kNN.")
        with isolate_rng():
            self._bank = self._features(_bank_loader(data), pl_module)
        if self._bank is None:
            self.say("the images of the bank have no labels, so there is no kNN.")
        return None

    def is_due(self) -> bool:
        """Whether there is a bank."""
        return self._bank is not None

    def probabilities(self, trainer: L.Trainer, features: Tensor, labels: Tensor, image_ids: Tensor) -> Tensor:
        """Probabilities from the votes of the nearest images of the bank."""
        assert self._bank is not None  # checked by is_due
        bank, bank_labels, bank_ids = self._bank
        if labels.shape[1] != bank_labels.shape[1]:
            raise ValueError(
                f"The bank has {bank_labels.shape[1]} labels, but the validation images have {labels.shape[1]}: "
                "give both sets the same classes in the same order."
            )
        ids = image_ids if _same_images(evaluation_data(trainer)) else None
        scores = knn_scores(
            features,
            bank,
            bank_labels,
            self.k,
            temperature=self.temperature,
            query_ids=ids,
            bank_ids=None if ids is None else bank_ids,
        )
        return scores.clamp(0, 1)  # a rounding error may lift a score above 1

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the mean average precision over all devices, and release the bank."""
        self._bank = None
        super().on_validation_epoch_end(trainer, pl_module)

    def _features(self, loader: Any, pl_module: L.LightningModule) -> tuple[Tensor, Tensor, Tensor] | None:
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
                features = self.features_of_images(pl_module, batch["image"][keep])
                # Normalise first, so that features of any scale fit in float16.
                parts.append(
                    (F.normalize(features).cpu().half(), batch["labels"][keep].to(torch.int8), batch["image_ids"][keep])
                )
        bank, labels, ids = (torch.cat(part) for part in zip(*parts, strict=True))
        return bank, labels, ids


def _same_images(data: EvaluationData | None) -> bool:
    """Whether bank and validation set are the same images."""
    if data is None:
        return False
    bank = data.train_records if data.probe_records is None else data.probe_records
    return bank is not None and bank is data.val_records


def _bank_loader(data: EvaluationData) -> Any:
    """Loader of the labelled whole images, all of them on every device."""
    loader = data.probe_dataloader()
    return data.image_dataloader("train") if loader is None else loader
