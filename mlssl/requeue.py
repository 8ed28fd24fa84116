"""End a run at the signal of a SLURM job that is about to time out, and requeue the job."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from mlssl.private import requeue_signal_of, restore_after_training

if TYPE_CHECKING:
    import lightning as L


class Requeue:
    """Replace Lightning's handler of the signal of ``SLURMEnvironment(auto_requeue=True)``, SIGUSR1 by default.

    Lightning saves at any point, also inside a step or a worker, and continues until SLURM ends the job. Outside a
    SLURM job, or if the user has set a handler, nothing changes.

    Args:
        trainer: Trainer of the run, before it starts.
        end: Called when the signal arrives; makes the run end before its next step.
    """

    def __init__(self, trainer: L.Trainer, end: Callable[[], None]) -> None:
        self._trainer, self._end = trainer, end
        self._process = os.getpid()
        self._is_signalled = False
        self._number = requeue_signal_of(trainer)
        is_free = self._number is not None and signal.getsignal(self._number) in (None, signal.SIG_DFL)
        if not is_free or threading.current_thread() is not threading.main_thread():
            self._number = None
        if self._number is not None:
            signal.signal(self._number, self._on_signal)

    def begin(self) -> None:
        """Make Lightning restore the default handler at the end of the run."""
        if self._number is not None:
            restore_after_training(self._trainer, self._number, signal.SIG_DFL)

    def finish(self) -> None:
        """Requeue the job if one of the processes got the signal; called by all processes after the run is saved."""
        if not self._trainer.strategy.reduce_boolean_decision(self._is_signalled, all=False):
            return
        if not self._trainer.is_global_zero:
            return
        for logger in self._trainer.loggers:  # SLURM may end the job at once
            logger.finalize("failed")
        refused = requeue_job()
        if refused is not None:
            warnings.warn(refused, stacklevel=2)

    def _on_signal(self, *_: object) -> None:
        if os.getpid() == self._process:  # not in a loader worker, which inherits the handler
            self._is_signalled = True
            self._end()


def requeue_job() -> str | None:
    """Put this SLURM job back into the queue, with ``scontrol requeue``.

    The job starts again with the same script, number and arguments, and with ``SLURM_RESTART_COUNT`` above 0.

    Returns:
        None, or why SLURM does not requeue the job, in one sentence.
    """
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip()
        return f"SLURM does not requeue job {job!r} ({reason}): submit a new job that resumes the run."
    return None
