"""Measure the time spent waiting for data and computing."""

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch

WINDOW = 50
"""Steps in the means. A median would hide the bursts in which loader workers deliver."""


class Throughput(L.Callback):
    """Log ``time/data`` and ``time/step`` in seconds and ``throughput/images_per_s``, also in the progress bar.

    ``time/data`` runs from the end of one step to the start of the next: waiting for the loader, sending the batch to
    the device. ``time/step`` is the rest: forward, backward, optimizer. ``throughput/images_per_s`` counts images, not
    views, of all devices over both times. All are means over the last 50 steps, without the first step of an epoch or
    after a validation, which waits not only for the loader. The callback never waits for the device: its computation
    counts in the step that next needs its result.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float, int]] = deque(maxlen=WINDOW)
        self._start_time = 0.0
        self._end_time: float | None = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave out the time between two epochs."""
        self._end_time = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave out the validation."""
        self._end_time = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the time at which waiting ends and computing starts."""
        self._start_time = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the means up to this step."""
        previous, self._end_time = self._end_time, time.perf_counter()
        if previous is None:
            return
        images = len(batch["image_ids"]) if isinstance(batch, Mapping) and "image_ids" in batch else 0
        self._steps.append(
            (self._start_time - previous, self._end_time - self._start_time, images * trainer.world_size)
        )
        data, step, images = (sum(column) for column in zip(*self._steps, strict=True))
        means = {"time/data": data / len(self._steps), "time/step": step / len(self._steps)}
        if images:
            means["throughput/images_per_s"] = images / (data + step)
        for name, value in means.items():
            # A Python number would be copied to the device and back, which synchronises.
            pl_module.log(name, torch.tensor(value), prog_bar=True, batch_size=1)
