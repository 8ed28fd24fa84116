"""Private internals of torch still do what the library needs them for."""

from __future__ import annotations

import time
from typing import Any

import pytest
from torch.utils.data import DataLoader

from mlssl.private import leave_out_of_torchs_sigchld_handler, workers_of


def kill_a_worker(batches: Any) -> None:
    """Returns once it is dead, unless a signal handler raises before."""
    worker = workers_of(batches)[0]
    worker.kill()
    ends = time.monotonic() + 30
    while worker.exitcode is None:
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_workers_of_a_loader_are_its_processes() -> None:
    batches = iter(DataLoader(range(8), num_workers=2))
    assert [worker.is_alive() for worker in workers_of(batches)] == [True, True]
    assert sorted(int(batch) for batch in batches) == list(range(8))
    assert workers_of(iter(DataLoader(range(8)))) == []


def test_torch_raises_the_death_of_a_worker_in_the_main_thread_unless_it_is_left_out() -> None:
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid \d+\) is killed by signal: Killed"):
        kill_a_worker(iter(DataLoader(range(8), num_workers=1)))
    batches = iter(DataLoader(range(8), num_workers=1))
    leave_out_of_torchs_sigchld_handler(batches)
    kill_a_worker(batches)
    leave_out_of_torchs_sigchld_handler(iter(DataLoader(range(8))))  # has no workers
