"""Private internals of torch that the library needs, in one place: a new release of torch is checked here."""

from __future__ import annotations

from multiprocessing.process import BaseProcess
from typing import Any

from torch._C import _remove_worker_pids


def workers_of(batches: Any) -> list[BaseProcess]:
    """Processes behind an iterator of a DataLoader; none where it loads in this process."""
    return list(getattr(batches, "_workers", []))


def leave_out_of_torchs_sigchld_handler(batches: Any) -> None:
    """Remove the workers of a DataLoader's iterator from those whose death torch raises on SIGCHLD.

    torch would raise wherever the main thread is. In the middle of an optimizer step that leaves half of the weights
    updated, which a checkpoint on the exception would save; in a destructor Python drops the exception.
    """
    if getattr(batches, "_worker_pids_set", False):
        _remove_worker_pids(id(batches))
        batches._worker_pids_set = False
