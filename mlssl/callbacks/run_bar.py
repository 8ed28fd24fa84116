"""One progress bar for the whole run."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from mlssl.bars import SECONDS_OF_LINES
from mlssl.callbacks.position import position_of
from mlssl.run_folder import read_log

SECONDS_BETWEEN_UPDATES = 0.5
"""Between two updates; reading values from the device waits for it."""


class RunBar(ProgressBar):
    """Show the progress of the whole run, with the time left, epoch, loss, ``probe/mAP`` and images per second.

    A resumed run starts at its position. During a validation its batches are counted in place of the epoch. If the
    output is not a terminal, one line per minute is printed instead. Validation, test and prediction outside a fit have
    a bar of their own. `mlssl.runs.run_settings` adds it unless the Trainer has another bar or none.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_enabled = True
        self._bar: tqdm[Any] | None = None
        self._label = ""
        self._done: int = 0
        self._total: float = math.inf
        self._start = 0
        self._start_time = 0.0
        self._last_drawn = 0.0
        self._probe: float | None = None
        self._last_line = ""

    def disable(self) -> None:
        """Show nothing, as on all processes except the first."""
        self._is_enabled = False

    def enable(self) -> None:
        """Show the bar again."""
        self._is_enabled = True

    # ------------------------------------------------------------------ a fit

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the last score of a resumed run."""
        self._done, self._bar = 0, None
        if trainer.global_step > 0:
            scores = read_log(Path(trainer.default_root_dir)).get("probe/mAP")
            self._probe = scores.values[-1] if scores else None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open the bar at the first step of this process, at the run's position."""
        self._label = f"epoch {trainer.current_epoch + 1}" + _of(trainer.max_epochs)
        if self._bar is None:
            self._open(*position_of(trainer, batch_idx))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step."""
        self._done, self._total = position_of(trainer, batch_idx + 1)
        self._draw()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the final values."""
        self._label = f"epoch {trainer.current_epoch}" + _of(trainer.max_epochs)  # already incremented
        self._close()

    # ------------------------------------------------------------------ whole images

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch; in a fit, show it in place of the epoch."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn == "fit":
            self._label = f"val {batch_idx + 1}" + _of(trainer.num_val_batches[dataloader_idx])
            self._draw()
        else:
            self._count("validate", batch_idx, trainer.num_val_batches[dataloader_idx])

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch."""
        self._count("test", batch_idx, trainer.num_test_batches[dataloader_idx])

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch."""
        self._count("predict", batch_idx, trainer.num_predict_batches[dataloader_idx])

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bar if the run ends early, so that messages come after it."""
        self._close()

    def _count(self, label: str, batch_idx: int, batches: float) -> None:
        if self._bar is None:
            self._label = label
            self._open(0, batches)
        self._done = batch_idx + 1
        self._draw()

    # ------------------------------------------------------------------ drawing

    def _open(self, done: int, total: float) -> None:
        if not self._is_enabled:
            return
        self._done = self._start = done
        self._total, self._start_time, self._last_drawn = total, time.monotonic(), 0.0
        is_shown = sys.stderr.isatty()
        number = int(total) if math.isfinite(total) else None
        self._bar = tqdm(
            total=number, initial=done, disable=not is_shown, dynamic_ncols=True, bar_format=self._format(), leave=True
        )
        if not is_shown:
            self._last_drawn = self._start_time

    def _draw(self, at_once: bool = False) -> None:
        """Draw the bar, or print a line if the output is not a terminal; do nothing if the last one is recent."""
        now = time.monotonic()
        if self._bar is None:
            return
        wait = SECONDS_OF_LINES if self._bar.disable else SECONDS_BETWEEN_UPDATES
        if not at_once and now - self._last_drawn < wait:
            return
        self._last_drawn = now
        if self._bar.disable:
            line = self._format().replace(" {bar}", "")
            if line != self._last_line:
                print(line, file=sys.stderr, flush=True)  # noqa: T201
            self._last_line = line
        else:
            self._bar.n, self._bar.bar_format = self._done, self._format()
            self._bar.refresh()

    def _close(self) -> None:
        if self._bar is not None:
            self._draw(at_once=True)
            self._bar.close()
        self._bar = None

    def _format(self) -> str:
        steps = self._done - self._start
        seconds = time.monotonic() - self._start_time
        seconds_left = seconds * (self._total - self._done) / steps if steps else math.inf
        metrics = self.trainer.progress_bar_metrics
        self._probe = metrics.get("probe/mAP", self._probe)
        return bar_format(
            self._label,
            self._done / self._total if self._total else 1.0,
            seconds_left,
            loss=metrics.get("loss"),
            probe=self._probe,
            rate=metrics.get("throughput/images_per_s"),
        )


def bar_format(
    label: str,
    fraction: float,
    seconds_left: float,
    *,
    loss: float | None = None,
    probe: float | None = None,
    rate: float | None = None,
) -> str:
    """Format of tqdm's bar; without the bar at most 77 columns for a run of 1000 epochs and 48 hours.

    >>> bar_format("epoch 3/100", 0.025, 4000, loss=5.2345, probe=0.3, rate=231.4)
    'epoch 3/100 {bar} 2% 1:06:40 left, loss 5.23, probe mAP 0.300, 231 images/s'
    """
    parts = [f"{math.floor(100 * fraction + 1e-9)}% {duration(seconds_left)} left"]
    if loss is not None:
        parts.append(f"loss {loss:.2f}")
    if probe is not None:
        parts.append(f"probe mAP {probe:.3f}")
    if rate is not None:
        parts.append(f"{rate:.3g} images/s" if rate < 10 else f"{rate:.0f} images/s")
    return f"{label} {{bar}} {', '.join(parts)}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, or days and hours.

    >>> duration(59), duration(3661), duration(200000), duration(float("inf"))
    ('0:59', '1:01:01', '2 d 7 h', '-:--')
    """
    if not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _of(number: float | None) -> str:
    return f"/{int(number)}" if number is not None and 0 < number < math.inf else ""
