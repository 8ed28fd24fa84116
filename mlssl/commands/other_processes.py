"""When one of several processes ends, the others end too, and say which one it was."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch

from mlssl.distributed import gather_objects, rank

SECONDS_BETWEEN_LOOKS = 0.2
"""Seconds between checks: Lightning's launcher kills this process within 5 s of another's end, without naming it."""

SECONDS_TO_END = 15.0
"""For a process to end by itself once another one is gone: gloo raises at once, NCCL waits for minutes."""

_OF_A_GROUP = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "process group")


class Process(NamedTuple):
    """One of the processes of a run."""

    rank: int
    host: str
    number: int


class OtherProcesses(L.Callback):
    """Watch the other processes of a run on this machine while it trains; a single process watches nothing.

    Where one is gone, this one is given time to end by itself, by the error of the collective that it waits in, and is
    ended otherwise: it would wait for a process that will not come. Processes on other machines are noticed by their
    collectives alone.
    """

    def __init__(self) -> None:
        self._others: list[Process] = []
        self._ended = threading.Event()
        self._raised = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Gather the processes of the run, and start watching them."""
        if trainer.world_size < 2:
            return
        own = Process(rank(), socket.gethostname(), os.getpid())
        self._others = [one for one in gather_objects(own) if one != own]
        self._ended.clear()
        threading.Thread(target=self._watch, name="mlssl-other-processes", daemon=True).start()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Wait for all processes, and stop watching: from now on each ends when it is done."""
        if self._others:
            trainer.strategy.barrier()
        self._ended.set()

    def on_exception(
        self,
        trainer: L.Trainer,  # noqa: ARG002
        pl_module: L.LightningModule,  # noqa: ARG002
        exception: BaseException,
    ) -> None:
        """This one is ending; where another one is the cause, in bounded time."""
        self._raised = _is_of_group(exception)
        if not self._raised:
            self._ended.set()

    def who_is_gone(self, error: BaseException) -> str | None:
        """One sentence naming the process that ended; None if the error is not from a collective."""
        if not (self._others and _is_of_group(error)):
            return None
        for _ in range(int(SECONDS_TO_END / SECONDS_BETWEEN_LOOKS)):  # it may still be ending
            gone = self._gone()
            if gone or all(one.host != socket.gethostname() for one in self._others):
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return _said(gone)

    def _gone(self) -> list[Process]:
        return [one for one in self._others if one.host == socket.gethostname() and not _is_running(one.number)]

    def _watch(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_LOOKS):
            gone = self._gone()
            if not gone or self._ended.is_set():
                continue
            if not self._raised:  # or the command says it
                sys.stderr.write(f"mlssl: error: {_said(gone)}\n")
                sys.stderr.flush()
            if not self._ended.wait(SECONDS_TO_END):
                os._exit(2)  # the main thread waits within a collective, which nothing interrupts
            return


def _is_of_group(error: BaseException) -> bool:
    """Whether a collective failed."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(one in str(error).lower() for one in _OF_A_GROUP)


def _said(gone: list[Process]) -> str:
    who = " and ".join(f"rank {one.rank} (process {one.number} on {one.host})" for one in gone)
    who = who or "a process on another machine, or one that still ends,"
    return (
        f"This is rank {rank()}, and {who} ended during the run: look at what that one printed, and go on from the "
        "last checkpoint."
    )


def _is_running(number: int) -> bool:
    """Whether a process of this machine is there, and no zombie."""
    status = Path(f"/proc/{number}/stat")
    if Path("/proc/self/stat").is_file():
        try:
            return status.read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
        except OSError:
            return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user, or a system without
        return True
    return True
