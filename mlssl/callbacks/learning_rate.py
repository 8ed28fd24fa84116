"""The learning rate of each step."""

from typing import Any

import lightning as L
import torch


class LearningRate(L.Callback):
    """Log ``train/lr``, the learning rate of the step, in the same row as the step's losses.

    It is the rate of the first parameter group of the first optimizer. Lightning's ``LearningRateMonitor`` logs every
    group, in a separate row.
    """

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Log before the schedule moves on."""
        if trainer.optimizers:
            # A Python number would be copied to the device and back, which synchronises.
            pl_module.log("train/lr", torch.as_tensor(trainer.optimizers[0].param_groups[0]["lr"]), batch_size=1)
