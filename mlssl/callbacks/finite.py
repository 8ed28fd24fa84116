"""Stop at a step whose loss or gradient is not finite, or skip a few such steps."""

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from mlssl.distributed import rank


class FiniteLoss(L.Callback):
    """Check each step's loss one step late, without waiting for the device; stop if it is not finite.

    No checkpoint is saved after such a step. The late loss is shown in the progress bar. `MultiLabelSSLModule` adds
    this callback itself; if `FiniteSteps` may skip steps, the decision is left to it.

    Raises:
        FloatingPointError: During the run, with step, rank, images and the last good checkpoint.
    """

    def __init__(self) -> None:
        self._pending: _PendingLoss | None = None
        self._image_ids: Tensor | None = None
        self._last_checkpoint = ""
        self._raises = True

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the last loss of another run."""
        self._pending = None
        skippers = [one for one in trainer.callbacks if isinstance(one, FiniteSteps)]  # type: ignore[attr-defined]
        self._raises = not any(one.max_skipped for one in skippers)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the images, and the last checkpoint: its callback sets the next path before saving."""
        self._image_ids = batch.get("image_ids") if isinstance(batch, Mapping) else None
        paths = [
            getattr(saver, name, "")
            for name in ("best_model_path", "last_model_path")
            for saver in trainer.checkpoint_callbacks
        ]
        self._last_checkpoint = next((path for path in reversed(paths) if path), "")

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Check the previous step's loss, and start copying this one to the host."""
        loss_before = self._check()
        if loss_before is not None:
            pl_module.log("loss", torch.tensor(loss_before), prog_bar=True, logger=False)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        factor = trainer.accumulate_grad_batches / (1 if scaler is None else scaler.get_scale())
        self._pending = _PendingLoss(loss, factor, trainer.global_step, trainer.current_epoch, self._image_ids)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the loss of the epoch's last step too."""
        self._check()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to save after a step whose loss is not finite."""
        self._check()

    def _check(self) -> float | None:
        """Check the previous step's loss; its copy to the host has finished, so this does not block."""
        pending = self._pending
        if pending is None:
            return None
        loss = pending.value()
        if math.isfinite(loss) or not self._raises:
            return loss
        images = "unknown" if pending.image_ids is None else pending.image_ids.tolist()
        raise FloatingPointError(
            f"The loss is {loss} at step {pending.step} (epoch {pending.epoch}) on rank {rank()}, with the images "
            f"{images}, and no checkpoint is saved after it; the last good checkpoint is "
            f"{self._last_checkpoint or 'none yet'}. Lower base_lr, add warmup_epochs, or use precision 32-true."
        )


class FiniteSteps(L.Callback):
    """Check each step's gradient before the optimizer step; NaN and infinity end the run or skip the step.

    A skipped step leaves weights, momenta and running statistics as they were; the learning rate schedule continues.
    All devices take the same decision. Unlike `FiniteLoss`, this waits for the device at every step.
    Under ``precision="16-mixed"`` infinite gradients are normal, and Lightning's scaler skips them itself.

    Args:
        max_skipped: Steps ≥ 0 of a run that may be skipped; the next one stops it.

    Raises:
        ValueError: If ``max_skipped`` is below 0.
        FloatingPointError: During the run, with step, rank and images.
    """

    def __init__(self, max_skipped: int = 0) -> None:
        if not max_skipped >= 0:
            raise ValueError(f"max_skipped={max_skipped} was given: pass a number of steps, at least 0.")
        self.max_skipped = max_skipped
        self._skipped = 0
        self._image_ids: list[Tensor] = []
        self._buffers: dict[str, Tensor] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the images of the step, and the buffers that its forward pass will change."""
        if not self._image_ids and self.max_skipped:
            self._buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}
        if isinstance(batch, Mapping) and "image_ids" in batch:
            self._image_ids.append(batch["image_ids"])

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Accept a finite gradient; skip the step or stop otherwise."""
        image_ids, self._image_ids = self._image_ids, []
        norms = [p.grad.detach().norm() for p in pl_module.parameters() if p.grad is not None]
        is_finite = not norms or bool(torch.stack(norms).sum().isfinite())
        has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
        if has_scaler or trainer.strategy.reduce_boolean_decision(is_finite):
            return
        self._skipped += 1
        images = torch.cat(image_ids).tolist() if image_ids else "unknown"
        what = (
            f"the gradient of step {trainer.global_step} (epoch {trainer.current_epoch}) is not finite on rank {rank()}"
            f", with the images {images}"
        )
        if self._skipped > self.max_skipped:
            raise FloatingPointError(
                f"Stopped: {what}; {self._skipped - 1} steps were skipped before. Lower base_lr, add "
                "warmup_epochs, use precision 32-true, or allow some to be skipped (FiniteSteps(max_skipped=10))."
            )
        optimizer.zero_grad(set_to_none=True)  # optimizers skip weights without a gradient
        for name, buffer in pl_module.named_buffers():
            buffer.copy_(self._buffers[name])
        rank_zero_warn(f"Skipped: {what}; {self.max_skipped - self._skipped} more may be skipped.")

    def state_dict(self) -> dict[str, Any]:
        """The number of steps skipped so far."""
        return {"skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the count."""
        self._skipped = state_dict["skipped"]


class _PendingLoss:
    """A loss being copied from the device to the host; only `value` waits for it."""

    def __init__(self, loss: Tensor, factor: float, step: int, epoch: int, image_ids: Tensor | None) -> None:
        self.factor = factor
        """Factor by which Lightning and the float16 scaler have divided the loss."""
        self.step = step
        self.epoch = epoch
        self.image_ids = image_ids
        self._loss = loss.detach().to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if loss.is_cuda else None  # type: ignore[no-untyped-call]
        if self._copied is not None:
            self._copied.record()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_PendingLoss":
        return self  # an event of the device cannot be copied

    def value(self) -> float:
        if self._copied is not None:
            self._copied.synchronize()
        return self._loss.item() * self.factor
