"""What a step compares, said once at the start of a run."""

from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from mlssl.distributed import world_size
from mlssl.private import BatchNorm


class StepSummary(L.Callback):
    """Say at the first step of a run how many views it has, and how many positives and negatives an anchor meets.

    On several devices it warns where batch norms are not synchronised. `MultiLabelSSLModule` adds it by itself.
    """

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the first batch of an epoch."""
        if batch_idx > 0 or "views" not in batch:
            return
        unsynchronised = count_unsynchronised(pl_module.modules())
        if unsynchronised and world_size() > 1:
            rank_zero_warn(
                f"{unsynchronised} batch norms take their statistics from one device alone, so {world_size()} devices "
                "do not compute what one would: pass sync_batchnorm=True to the Trainer "
                "(--trainer.sync_batchnorm true), on GPUs."
            )
        if trainer.global_step == 0:
            rank_zero_info(describe_step(batch["views"], world_size()))


def describe_step(views: Tensor, devices: int) -> str:
    """Describe a step on views (B, A, K, C, S, S) per device.

    >>> import torch
    >>> describe_step(torch.zeros(4, 2, 3, 3, 8, 8), 1).partition("; ")[0]
    'A step: 4 images on each of 1 device(s), 24 views'
    """
    images, branches, blocks = views.shape[:3]
    anchors = 2 * images * blocks * devices  # of one set: the predictions of one branch, the projections of another
    positives = 2 * blocks - 1
    return (
        f"A step: {images} images on each of {devices} device(s), {images * branches * blocks * devices} views; "
        f"each anchor meets {positives} positives and {anchors - 1 - positives} negatives. "
        "Gradient accumulation adds none."
    )


def count_unsynchronised(layers: Iterable[nn.Module]) -> int:
    """Count the batch norms in training mode that take their statistics from one device alone."""
    return sum(
        isinstance(layer, BatchNorm) and type(layer) is not nn.SyncBatchNorm and layer.training for layer in layers
    )
