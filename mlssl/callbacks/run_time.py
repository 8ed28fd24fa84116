"""Estimate the duration of the whole run from its first steps, and name options that would halve it."""

from __future__ import annotations

import math
import os
import time
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from mlssl.callbacks.position import position_of
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.durations import in_words

MEASURED_STEPS = 20
"""Steps after which the estimate is printed."""

WARM_UP = 3
"""First steps that are not timed: workers start, and libraries choose their kernels."""

SHORT_RUN_SECONDS = 120.0
"""Seconds below which no options are suggested."""

MAX_WAITING = 0.2
"""Maximum fraction of a step spent waiting for images if computation is the bottleneck."""

LIGHTER = {
    "resnet152": ("resnet50", 0.36),
    "resnet101": ("resnet50", 0.53),
    "resnet50": ("resnet18", 0.44),
    "resnet34": ("resnet18", 0.50),
    "resnet18": ("resnet10t", 0.61),
    "convnext_base": ("convnext_small", 0.57),
    "convnext_small": ("convnext_tiny", 0.51),
    "convnext_tiny": ("convnext_nano", 0.55),
    "vit_base_patch16_224": ("vit_small_patch16_224", 0.26),
    "vit_small_patch16_224": ("vit_tiny_patch16_224", 0.27),
}
"""timm name → a lighter network of the same kind, and its fraction of the multiplications."""


class RunTime(L.Callback):
    """Print after twenty steps how long the run will take on this machine, and options that would halve it.

    Nothing is printed for a run of fewer steps or without an end. For a resumed run only the time is printed, because
    its network and size are fixed.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._steps = 0
        self._start_time = self._waited = 0.0
        self._end_time: float | None = None
        self._start = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the counters."""
        self._reset()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the time between two epochs out of the waiting time."""
        self._end_time = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the validation out of the waiting time."""
        self._end_time = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Add the time that the step has waited for its images."""
        if self._steps == 0:
            self._start = position_of(trainer, batch_idx).done
        if self._end_time is not None and WARM_UP <= self._steps < MEASURED_STEPS:
            self._waited += time.perf_counter() - self._end_time

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print the estimate at the twentieth step."""
        self._steps += 1
        if self._steps > MEASURED_STEPS:
            return
        self._end_time = time.perf_counter()
        if self._steps == WARM_UP:
            self._start_time = self._end_time
        position = position_of(trainer, batch_idx + 1)
        if self._steps < MEASURED_STEPS or not math.isfinite(position.total) or position.done >= position.total:
            return
        seconds = self._end_time - self._start_time
        per_step = seconds / (MEASURED_STEPS - WARM_UP)
        lines = [describe_time(per_step, int(position.total) - position.done)]
        if self._start == 0 and per_step * position.total > SHORT_RUN_SECONDS:
            ways = ways_to_halve(_settings(trainer, pl_module), self._waited / seconds)
            lines += ["to about halve it:", *ways] if ways else []
        rank_zero_info("\n".join(lines))


def describe_time(seconds_per_step: float, steps: int) -> str:
    """Describe the duration of the given number of steps.

    >>> describe_time(1.25, 9600)
    'time      about 3 h 20 min for 9600 more steps of 1.25 s, validation not counted'
    """
    duration = in_words(seconds_per_step * steps)
    return f"time      about {duration} for {steps} more steps of {seconds_per_step:.3g} s, validation not counted"


def ways_to_halve(settings: dict[str, Any], waiting: float) -> list[str]:
    """Options that would about halve a run, one per line, from its settings and its waiting time.

    Args:
        settings: ``max_epochs`` or ``max_steps``; ``size``, ``backbone``, ``workers`` and ``cores`` if known.
        waiting: Fraction of a step, 0–1, spent waiting for images.

    >>> for line in ways_to_halve({"max_epochs": 100, "size": 224, "backbone": "resnet50"}, waiting=0.05):
    ...     print(line)
      --trainer.max_epochs 50      half the epochs
      --data.size 160              51 % of the pixels
      --model.backbone resnet18    44 % of the operations
    """
    options = []
    for name, what in (("max_epochs", "epochs"), ("max_steps", "steps")):
        number = settings.get(name)
        if number is not None and number > 1:
            options.append((f"--trainer.{name} {number // 2}", f"half the {what}"))
            break
    if waiting > MAX_WAITING:
        workers, cores = settings.get("workers"), settings.get("cores") or 1
        if workers is not None and workers < cores - 1:
            more = f"{waiting:.0%} of a step waits for images, which {workers} of {cores} cores load"
            options.append((f"--data.num_workers {min(2 * max(1, workers), cores - 1)}", more))
    else:
        size, name = settings.get("size"), str(settings.get("backbone"))
        smaller = None if size is None else round(size / math.sqrt(2) / 16) * 16
        if smaller is not None and smaller >= 32 and smaller < size and "patch14" not in name:
            options.append((f"--data.size {smaller}", f"{(smaller / size) ** 2:.0%} of the pixels".replace("%", " %")))
        if name in LIGHTER:
            lighter, fraction = LIGHTER[name]
            options.append((f"--model.backbone {lighter}", f"{100 * fraction:.0f} % of the operations"))
    return [f"  {option:<28} {why}" for option, why in options]


def _settings(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
    data = trainer.datamodule  # type: ignore[attr-defined]
    settings: dict[str, Any] = {"backbone": pl_module.hparams.get("backbone"), "cores": os.cpu_count()}
    if isinstance(data, MultiLabelDataModule):
        settings["size"] = data.views.size
        settings["workers"] = getattr(trainer.train_dataloader, "num_workers", None)
    if trainer.max_steps > 0:
        settings["max_steps"] = trainer.max_steps
    else:
        settings["max_epochs"] = trainer.max_epochs
    return settings
