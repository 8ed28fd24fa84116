"""Loader processes: their number and their initialisation."""

from __future__ import annotations

import os
import signal
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset

from mlssl.data.loader import PartialLoader, ResumableLoader

AnyLoader = TypeVar("AnyLoader", ResumableLoader, PartialLoader)

MAX_WORKERS = 8
"""Default maximum of worker processes, so that a run does not take all of a large machine."""


def default_workers(devices: int) -> int:
    """One less than the cores per device, at least 1 and at most `MAX_WORKERS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, cores // devices - 1))


def make_loader(
    kind: type[AnyLoader],
    dataset: Dataset[Any],
    batch_size: int,
    num_workers: int,
    *,
    timeout: float,
    keep_workers: bool,
    **settings: Any,
) -> AnyLoader:
    """A loader that does not use the global random state.

    Args:
        kind: Class of the loader.
        dataset: The data set.
        batch_size: Items per batch.
        num_workers: Processes, 0 for none.
        timeout: Seconds to wait for a batch; 0 waits forever.
        keep_workers: Whether to keep the processes between epochs.
        **settings: Further DataLoader arguments.
    """
    return kind(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        persistent_workers=keep_workers and num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_prepare_worker,
        timeout=timeout if num_workers else 0,
        generator=torch.Generator(),  # else every pass would sample from the model's random state
        **settings,
    )


def _prepare_worker(_worker: int) -> None:
    import cv2

    cv2.setNumThreads(0)  # workers are parallel already: threads would compete for the same cores
    # A terminal's Ctrl-C reaches workers too, and their death would be reported instead of the interrupt.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
