"""Loaders and their processes: how many there are, and how one begins."""

from __future__ import annotations

import os
import signal
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset

from mlssl.data.loader import PartialLoader, ResumableLoader

AnyLoader = TypeVar("AnyLoader", ResumableLoader, PartialLoader)

MAX_WORKERS = 8
"""Worker processes at most, where the user does not say, so that a run does not take all of a large machine."""


def default_workers(devices: int) -> int:
    """One less than a device's share of the cores, at least 1 and at most `MAX_WORKERS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, cores // devices - 1))


def loader_of(
    kind: type[AnyLoader],
    dataset: Dataset[Any],
    batch_size: int,
    num_workers: int,
    *,
    timeout: float,
    keep_workers: bool,
    **settings: Any,
) -> AnyLoader:
    """A loader that draws nothing from the global random state.

    Args:
        kind: Its class.
        dataset: What it loads.
        batch_size: Items of a batch.
        num_workers: Processes, 0 for none.
        timeout: Seconds that they may take for a batch; 0 waits for ever.
        keep_workers: Whether they live on from one epoch to the next.
        **settings: Of a DataLoader.
    """
    return kind(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        persistent_workers=keep_workers and num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_prepare_worker,
        timeout=timeout if num_workers else 0,
        generator=torch.Generator(),  # else every pass over a loader would draw from the model's random state
        **settings,
    )


def _prepare_worker(_worker: int) -> None:
    import cv2

    cv2.setNumThreads(0)  # workers are parallel already: threads would fight over the same cores
    # A terminal's Ctrl-C reaches workers too, and the death of one would be reported in place of the interrupt.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
