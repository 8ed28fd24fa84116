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
    """Check each step's loss one step late, so that nothing waits for the device; stop if it is not finite.

    No checkpoint is saved after such a step. The late loss is shown in the progress bar. `MultiLabelSSLModule` adds
    this callback itself; if `FiniteSteps` may skip steps, the decision is left to it.

    Raises:
        FloatingPointError: During the run, with step, rank, images and the last good checkpoint.
    """

    def __init__(self) -> None:
        self._late: _LateLoss | None = None
        self._image_ids: Tensor | None = None
        self._last_checkpoint = ""
        self._stops = True

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the last loss of another run."""
        self._late = None
        skipping = [one for one in trainer.callbacks if isinstance(one, FiniteSteps)]  # type: ignore[attr-defined]
        self._stops = not any(one.max_skipped for one in skipping)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the images, and the last checkpoint, as its callback names the next one before that is saved."""
        self._image_ids = batch.get("image_ids") if isinstance(batch, Mapping) else None
        paths = [
            getattr(saver, name, "")
            for name in ("best_model_path", "last_model_path")
            for saver in trainer.checkpoint_callbacks
        ]
        self._last_checkpoint = next((path for path in reversed(paths) if path), "")

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Check the previous step's loss, and start copying this one to the host."""
        before = self._check()
        if before is not None:
            pl_module.log("loss", torch.tensor(before), prog_bar=True, logger=False)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        factor = trainer.accumulate_grad_batches / (1 if scaler is None else scaler.get_scale())
        self._late = _LateLoss(loss, factor, trainer.global_step, trainer.current_epoch, self._image_ids)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the loss of the epoch's last step too."""
        self._check()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to save after a step whose loss is not finite."""
        self._check()

    def _check(self) -> float | None:
        """Check the previous step's loss; its copy to the host has finished, so this does not block."""
        late = self._late
        if late is None:
            return None
        loss = late.value()
        if math.isfinite(loss) or not self._stops:
            return loss
        images = "unknown" if late.image_ids is None else late.image_ids.tolist()
        raise FloatingPointError(
            f"The loss is {loss} at step {late.step} (epoch {late.epoch}) on rank {rank()}, whose images are "
            f"{images}, and nothing of this step was kept; the last good checkpoint is "
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
            raise ValueError(f"max_skipped={max_skipped} was given: pass a number of steps of at least 0.")
        self.max_skipped = max_skipped
        self._skipped = 0
        self._image_ids: list[Tensor] = []
        self._buffers: dict[str, Tensor] = {}

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
        optimizer.zero_grad(set_to_none=True)  # optimizers skip weights without a gradient
        for name, buffer in pl_module.named_buffers():
            buffer.copy_(self._buffers[name])
        rank_zero_warn(f"Skipped: {what}; {self.max_skipped - self._skipped} more may be skipped.")

    def state_dict(self) -> dict[str, Any]:
        """How many steps were skipped so far."""
        return {"skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the count."""
        self._skipped = state_dict["skipped"]


class _LateLoss:
    """A loss being copied from the device to the host; only `value` waits for it."""

    def __init__(self, loss: Tensor, factor: float, step: int, epoch: int, image_ids: Tensor | None) -> None:
        self.factor = factor
        """By which Lightning and the scaler of float16 have divided the loss."""
        self.step = step
        self.epoch = epoch
        self.image_ids = image_ids
        self._loss = loss.detach().to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if loss.is_cuda else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_LateLoss":
        return self  # an event of the device cannot be copied

    def value(self) -> float:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._loss.item() * self.factor
