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

STEPS = 20
"""After which the run says how long it will take."""

WARM_UP = 3
"""Of these, left out: workers start, and libraries choose their kernels."""

SHORT = 120.0
"""Seconds below which a run is short enough: no options are suggested."""

MOST_WAITING = 0.2
"""Share of a step up to which its time is that of computing."""

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
"""timm's name → that of a lighter network of its kind, and the share of multiplications that it takes."""


class RunTime(L.Callback):
    """Say after twenty steps how long the run will take on this machine, and what would halve it.

    Nothing is printed for a run of fewer steps or without an end. For a resumed run only the time is printed, since
    another network or size would be another run.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._steps = 0
        self._began = self._waited = 0.0
        self._ended: float | None = None
        self._first = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        self._forget()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the time between two epochs out of the waiting time."""
        self._ended = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Likewise a validation."""
        self._ended = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count how long the step has waited for its images."""
        if self._steps == 0:
            self._first = position_of(trainer, batch_idx).done
        if self._ended is not None and WARM_UP <= self._steps < STEPS:
            self._waited += time.perf_counter() - self._ended

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print the estimate at the twentieth step."""
        self._steps += 1
        if self._steps > STEPS:
            return
        self._ended = time.perf_counter()
        if self._steps == WARM_UP:
            self._began = self._ended
        at = position_of(trainer, batch_idx + 1)
        if self._steps < STEPS or not math.isfinite(at.total) or at.done >= at.total:
            return
        spent = self._ended - self._began
        per_step = spent / (STEPS - WARM_UP)
        lines = [describe_time(per_step, int(at.total) - at.done)]
        if self._first == 0 and per_step * at.total > SHORT:
            ways = ways_to_halve(_settings(trainer, pl_module), self._waited / spent)
            lines += ["about half of that:", *ways] if ways else []
        rank_zero_info("\n".join(lines))


def describe_time(seconds_per_step: float, steps: int) -> str:
    """Say how long so many steps take.

    >>> describe_time(1.25, 9600)
    'time      about 3 h 20 min for the 9600 steps to come on this machine, 1.25 s each, validation not counted'
    """
    return (
        f"time      about {in_words(seconds_per_step * steps)} for the {steps} steps to come on this machine, "
        f"{seconds_per_step:.3g} s each, validation not counted"
    )


def ways_to_halve(settings: dict[str, Any], waiting: float) -> list[str]:
    """Options that would about halve a run, one per line, from its settings and its waiting time.

    Args:
        settings: ``max_epochs`` or ``max_steps``; ``size``, ``backbone``, ``workers`` and ``cores`` where known.
        waiting: Share of a step, 0–1, in which it waits for images.

    >>> for line in ways_to_halve({"max_epochs": 100, "size": 224, "backbone": "resnet50"}, waiting=0.05):
    ...     print(line)
      --trainer.max_epochs 50      half the epochs
      --data.size 160              51 % of the pixels
      --model.backbone resnet18    44 % of the operations
    """
    found = []
    for name, what in (("max_epochs", "epochs"), ("max_steps", "steps")):
        number = settings.get(name)
        if number is not None and number > 1:
            found.append((f"--trainer.{name} {number // 2}", f"half the {what}"))
            break
    if waiting > MOST_WAITING:
        workers, cores = settings.get("workers"), settings.get("cores") or 1
        if workers is not None and workers < cores - 1:
            more = f"{waiting:.0%} of a step is waiting for images: {workers} of {cores} cores load them"
            found.append((f"--data.num_workers {min(2 * max(1, workers), cores - 1)}", more))
    else:
        size, name = settings.get("size"), str(settings.get("backbone"))
        smaller = None if size is None else round(size / math.sqrt(2) / 16) * 16
        if smaller is not None and smaller >= 32 and smaller < size and "patch14" not in name:
            found.append((f"--data.size {smaller}", f"{(smaller / size) ** 2:.0%} of the pixels".replace("%", " %")))
        if name in LIGHTER:
            lighter, share = LIGHTER[name]
            found.append((f"--model.backbone {lighter}", f"{100 * share:.0f} % of the operations"))
    return [f"  {option:<28} {why}" for option, why in found]


def _settings(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
    data = trainer.datamodule  # type: ignore[attr-defined]
    known: dict[str, Any] = {"backbone": pl_module.hparams.get("backbone"), "cores": os.cpu_count()}
    if isinstance(data, MultiLabelDataModule):
        known["size"] = data.views.size
        known["workers"] = getattr(trainer.train_dataloader, "num_workers", None)
    if trainer.max_steps > 0:
        known["max_steps"] = trainer.max_steps
    else:
        known["max_epochs"] = trainer.max_epochs
    return known
