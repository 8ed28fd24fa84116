"""Stop at a step whose loss or gradient is no number, or skip a few such steps."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from mlssl.distributed import rank


class FiniteSteps(L.Callback):
    """Look at the gradient of every step before the optimizer does; NaN and infinity end the run or skip the step.

    A skipped step leaves weights, momenta and running statistics as they were; the learning rate goes on. All devices
    decide alike. The module's own look at the loss, one step late and without a wait for the device, names no
    gradient; it is left to this callback where it may skip.
    Under ``precision="16-mixed"`` infinite gradients are ordinary, and Lightning's scaler skips them itself.

    Args:
        max_skipped: Steps ≥ 0 of a run that may be skipped; the next one stops it.

    Raises:
        ValueError: If ``max_skipped`` is below 0.
        FloatingPointError: During the run, with step, rank and images.
    """

    def __init__(self, max_skipped: int = 0) -> None:
        if not max_skipped >= 0:
            raise ValueError(f"max_skipped={max_skipped} was given: pass a number of steps of at least 0.")
        self.max_skipped = max_skipped
        self._skipped = 0
        self._image_ids: list[Tensor] = []
        self._buffers: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the module's look at the loss, whose NaN is in the gradient too."""
        if self.max_skipped and hasattr(pl_module, "stops_at_loss_that_is_no_number"):
            pl_module.stops_at_loss_that_is_no_number = False  # type: ignore[assignment]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the images of the step, and the statistics that its forward pass will change."""
        if not self._image_ids and self.max_skipped:
            self._buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}
        if isinstance(batch, Mapping) and "image_ids" in batch:
            self._image_ids.append(batch["image_ids"])

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Let a finite gradient pass; undo or refuse any other."""
        image_ids, self._image_ids = self._image_ids, []
        norms = [p.grad.detach().norm() for p in pl_module.parameters() if p.grad is not None]
        finite = not norms or bool(torch.stack(norms).sum().isfinite())
        has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
        if has_scaler or trainer.strategy.reduce_boolean_decision(finite):
            return
        self._skipped += 1
        images = torch.cat(image_ids).tolist() if image_ids else "unknown"
        what = (
            f"the gradient of step {trainer.global_step} (epoch {trainer.current_epoch}) is not finite on rank {rank()}"
            f", whose images are {images}"
        )
        if self._skipped > self.max_skipped:
            raise FloatingPointError(
                f"Stopped: {what}; {self._skipped - 1} such steps were skipped before. Lower base_lr, add "
                "warmup_epochs, use precision 32-true, or allow to skip some (FiniteSteps(max_skipped=10))."
            )
        optimizer.zero_grad(set_to_none=True)  # an optimizer passes over weights without a gradient
        for name, buffer in pl_module.named_buffers():
            buffer.copy_(self._buffers[name])
        rank_zero_warn(f"Skipped: {what}; {self.max_skipped - self._skipped} more may be skipped.")

    def state_dict(self) -> dict[str, Any]:
        """How many steps were skipped so far."""
        return {"skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._skipped = state_dict["skipped"]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the module's own look at the loss back."""
        if hasattr(pl_module, "stops_at_loss_that_is_no_number"):
            pl_module.stops_at_loss_that_is_no_number = True  # type: ignore[assignment]
