"""Processes that form a gloo group for one call, and wait for the next one."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class Processes:
    """Up to `most` processes, started at the first call that needs them; each imports the library once.

    Args:
        folder: Folder through which the processes connect.
        most: Maximum number of processes.
    """

    def __init__(self, folder: Path, most: int = 4) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mlssl"])
        self._workers = [ProcessPoolExecutor(1, mp_context=context) for _ in range(most)]
        self._folder = folder
        self._calls = 0

    def run(self, function: Callable[..., Any], *arguments: Any, processes: int = 2) -> list[Any]:
        """Call `function(*arguments)` in every process of a new group; return the results in rank order."""
        self._calls += 1
        store = self._folder / f"store-{self._calls}"
        call = pickle.dumps((function, arguments))
        futures = [
            worker.submit(_in_group, call, rank, processes, str(store))
            for rank, worker in enumerate(self._workers[:processes])
        ]
        ended, _ = wait(futures, timeout=300)  # all, so that the next call finds them free
        errors = {rank: future.exception() for rank, future in enumerate(futures) if future in ended}
        for rank, error in errors.items():
            if error is not None:
                sys.stderr.write(f"rank {rank}: {error!r}\n")  # of all, because one may be the cause of another's
        return [pickle.loads(future.result(timeout=0)) for future in futures]

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.shutdown()


def _in_group(call: bytes, rank: int, processes: int, store: str) -> bytes:
    function, arguments = pickle.loads(call)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=processes, timeout=timedelta(seconds=180))
    dist.barrier()  # else one could be through and gone before another has connected to it
    try:
        return pickle.dumps(function(*arguments))  # bytes, so that no tensor is shared between processes
    finally:
        dist.destroy_process_group()
