"""Position of the training within the whole run, for the bar, the start and the time estimate."""

from __future__ import annotations

import math
from typing import NamedTuple

import lightning as L


class Position(NamedTuple):
    """Batches of the whole run, including those before a resume."""

    done: int
    total: float
    """Infinite if neither epochs nor steps are limited."""


def position_of(trainer: L.Trainer, batches: int) -> Position:
    """The position of a run after `batches` batches of its current epoch."""
    per_epoch = trainer.num_training_batches
    epochs, steps = trainer.max_epochs, trainer.max_steps
    by_epochs = math.inf if epochs is None or epochs < 0 else epochs * per_epoch
    by_steps = math.inf if steps < 0 else steps * trainer.accumulate_grad_batches
    before = trainer.current_epoch * per_epoch if trainer.current_epoch else 0  # 0 · inf is NaN
    done = batches + (0 if math.isinf(before) else int(before))
    return Position(done, max(done, min(by_epochs, by_steps)))
