"""Ctrl-C ends a run cleanly, whenever it is pressed."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import lightning as L

_NOTICE = b"\r\x1b[Kmlssl: stopping after this step; press Ctrl-C again to stop at once\r"
"""Only on a terminal. The progress bar overwrites it, so that an interrupt leaves one line: the last."""


class Interrupts(L.Callback):
    """While entered, Ctrl-C ends training before the next step; a second Ctrl-C, or outside training, at once.

    A KeyboardInterrupt raised wherever the signal arrives may break a step in the middle, or be dropped: Python drops
    it in a destructor, as when the workers of a finished pass are ended, and the run would continue. A worker that has
    just been forked would die of it, or stop in the middle of a reply.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._is_training = False
        self._is_requested = False

    def __enter__(self) -> Interrupts:
        """Install the handler, unless another one is installed."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the signal's handler; if Lightning ignores the signal after the first, it stays ignored."""
        if signal.getsignal(signal.SIGINT) == self._interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_start(self, *_: Any, **__: Any) -> None:
        """From here on, an interrupt waits for the end of the step."""
        self._is_training = True

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Interrupts end the run at once again."""
        self._is_training = False

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        """End the run here if an interrupt arrived."""
        self._end()

    def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
        """End the validation here if an interrupt arrived."""
        self._end()

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        if self._is_training and not self._is_requested:
            self._is_requested = True
            if os.isatty(2):
                os.write(2, _NOTICE)  # print may be in the middle of something
            return
        raise KeyboardInterrupt

    def _end(self) -> None:
        if self._is_requested:
            raise KeyboardInterrupt
