"""The learning rate of each step."""

from typing import Any

import lightning as L
import torch


class LearningRate(L.Callback):
    """Log ``train/lr``, the rate that the step is taken with, in one row with the losses of the step.

    It is that of the first parameter group of the first optimizer. Lightning's ``LearningRateMonitor`` logs every
    group, in a row of its own.
    """

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Log before the schedule moves on."""
        if trainer.optimizers:
            # A number would be copied to the device and back, and so wait for it.
            pl_module.log("train/lr", torch.as_tensor(trainer.optimizers[0].param_groups[0]["lr"]), batch_size=1)
