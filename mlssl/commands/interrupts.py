"""Ctrl-C that ends a run wherever it falls."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import lightning as L


class Interrupts(L.Callback):
    """While entered, a Ctrl-C that Python drops is raised again at the next step, and reaches this process alone.

    Python drops the KeyboardInterrupt of a Ctrl-C that falls into a destructor or a fork, as when the workers of a
    finished pass are ended, and the run would go on. A worker that has just been forked would die of its own.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._came = False

    def __enter__(self) -> Interrupts:
        """Listen, unless somebody else does."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the signal as it was; where Lightning ignores a second Ctrl-C, it stays ignored."""
        if signal.getsignal(signal.SIGINT) == self._interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        """Heed what was dropped since the last step."""
        self._heed()

    def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
        """The same for whole images."""
        self._heed()

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        if os.getpid() == self._process:
            self._came = True
            raise KeyboardInterrupt

    def _heed(self) -> None:
        if self._came:
            raise KeyboardInterrupt
