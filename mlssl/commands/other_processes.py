"""If one of several processes ends, the others end too and name it."""

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

SECONDS_BETWEEN_CHECKS = 0.2
"""Seconds between checks: Lightning's launcher kills this process within 5 s of another's end, without naming it."""

GRACE_SECONDS = 15.0
"""Grace period for a process once another one has ended: gloo raises at once, NCCL waits for minutes."""

_GROUP_ERRORS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "process group")


class Process(NamedTuple):
    """One of the processes of a run."""

    rank: int
    host: str
    number: int


class OtherProcesses(L.Callback):
    """Watch the other processes of a run on this machine during training; does nothing for a single process.

    If one ends, this process gets some time to end with the error of the collective that it waits in, and is ended
    otherwise: it would wait forever. The end of a process on another machine shows only as such an error.
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
        """Wait for all processes and stop watching: from here on, each ends when it is done."""
        if self._others:
            trainer.strategy.barrier()
        self._ended.set()

    def on_exception(
        self,
        trainer: L.Trainer,  # noqa: ARG002
        pl_module: L.LightningModule,  # noqa: ARG002
        exception: BaseException,
    ) -> None:
        """This process is ending; keep watching only if another process may be the cause."""
        self._raised = _is_collective_error(exception)
        if not self._raised:
            self._ended.set()

    def describe_ended(self, error: BaseException) -> str | None:
        """One sentence naming the process that ended; None if the error is not from a collective."""
        if not (self._others and _is_collective_error(error)):
            return None
        for _ in range(int(GRACE_SECONDS / SECONDS_BETWEEN_CHECKS)):  # it may still be ending
            gone = self._ended_processes()
            if gone or all(one.host != socket.gethostname() for one in self._others):
                break
            time.sleep(SECONDS_BETWEEN_CHECKS)
        return _message(gone)

    def _ended_processes(self) -> list[Process]:
        return [one for one in self._others if one.host == socket.gethostname() and not _is_running(one.number)]

    def _watch(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_CHECKS):
            gone = self._ended_processes()
            if not gone or self._ended.is_set():
                continue
            if not self._raised:  # or the command says it
                sys.stderr.write(f"mlssl: error: {_message(gone)}\n")
                sys.stderr.flush()
            if not self._ended.wait(GRACE_SECONDS):
                os._exit(2)  # the main thread waits in a collective, which cannot be interrupted
            return


def _is_collective_error(error: BaseException) -> bool:
    """Whether a collective failed."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(one in str(error).lower() for one in _GROUP_ERRORS)


def _message(gone: list[Process]) -> str:
    ended = " and ".join(f"rank {one.rank} (process {one.number} on {one.host})" for one in gone)
    ended = ended or "a process on another machine, or one that is still ending,"
    return (
        f"This is rank {rank()}, and {ended} ended during the run: check its output, and resume from the last "
        "checkpoint."
    )


def _is_running(number: int) -> bool:
    """Whether a process of this machine is running and is not a zombie."""
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
    except OSError:  # of another user
        return True
    return True
