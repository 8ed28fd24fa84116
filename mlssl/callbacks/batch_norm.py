"""Re-estimate batch-norm statistics on whole images at the end of training."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng

from mlssl.callbacks.networks import BACKBONE, NetworkCallback, batch_size_of, evaluation_data, workers_of
from mlssl.data.bad_images import BadImages
from mlssl.data.datasets import ImageDataset, collated
from mlssl.data.loader import PartialLoader
from mlssl.distributed import is_sharded
from mlssl.evaluation.features import image_features
from mlssl.modes import eval_mode
from mlssl.private import BatchNorm
from mlssl.report.measure import some_images


class BatchNormStatistics(NetworkCallback):
    """Estimate the running statistics of the network's batch norms on whole images at the end of training.

    During training the statistics are those of augmented views of blocks, while evaluation and transfer use whole
    images. Each batch norm resets its statistics and takes the mean over batches of `num_images` training images,
    evenly spaced, without augmentation and at the datamodule's `eval_size`; labels are not used. All devices use the
    same images and get the same statistics. Weights and random state do not change, and no metric is logged.

    It acts in ``on_train_end``: after averaging callbacks that come before it in the list, and before `BackboneExport`
    writes. ``last.ckpt`` is saved again with the new statistics; checkpoints of single epochs keep theirs. A run
    resumed from it gets the same weights as without the callback, because training uses the statistics of the batch.
    If the run has no datamodule with images, the network has no batch norm, or FSDP shards it, one line says that
    nothing is done.

    Args:
        num_images: At least 2; limited to the size of the training set.
        network: Name of the submodule whose batch norms are re-estimated, from normalised images to features.

    Raises:
        ValueError: If num_images is below 2; before the run, if the module has no such network.
        TypeError: If the network is not the backbone, and the model has no ``normalize`` for its images.
    """

    def __init__(self, num_images: int = 1000, network: str = BACKBONE) -> None:
        super().__init__(network)
        if num_images < 2:
            raise ValueError(f"num_images={num_images} was given: pass at least 2, or leave BatchNormStatistics out.")
        self.num_images = num_images
        self._is_sharded = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check whether this device has the network."""
        self._is_sharded = is_sharded(trainer.strategy.model or pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Estimate the statistics, and save the last checkpoint again."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        data, network = evaluation_data(trainer), self.network_of(pl_module)
        if data is None or data.train_records is None or network is None:
            return self.say("nothing is done: the run has no datamodule with whole images, or no such network.")
        if self._is_sharded:
            return self.say("nothing is done: FSDP shards the network, and no device has all of it.")
        norms = [one for one in network.backbone.modules() if isinstance(one, BatchNorm) and one.track_running_stats]
        if not norms:
            return self.say("nothing is done: the network has no batch norm with running statistics.")
        records = some_images(data.train_records, self.num_images)
        batch_size = max(2, min(batch_size_of(trainer), len(records)))
        loader = PartialLoader(
            ImageDataset(records, data.eval_size, BadImages(len(records))),
            batch_size,
            num_workers=workers_of(trainer),
            collate_fn=collated,
            generator=torch.Generator(),
        )
        momenta = [norm.momentum for norm in norms]
        with isolate_rng(), eval_mode(network.backbone):
            for norm in norms:
                norm.reset_running_stats()
                norm.train()
                norm.momentum = None  # the mean over all batches
            for batch in loader:
                if len(batch["image"]) == batch_size:  # a smaller batch would have the same weight as the others
                    image_features(network.backbone, network.normalize, batch["image"])
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for saver in trainer.checkpoint_callbacks:
            if isinstance(saver, ModelCheckpoint) and saver.last_model_path:
                trainer.save_checkpoint(saver.last_model_path, saver.save_weights_only)
        return None
