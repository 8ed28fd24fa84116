"""Loaders that track their position in an epoch, to resume there and to name step, rank and images in errors."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader, RandomSampler

from mlssl.data.datasets import EpochSampler
from mlssl.data.decoding import BadImageError
from mlssl.distributed import rank, world_size
from mlssl.private import leave_out_of_torchs_sigchld_handler, workers_of

SECONDS_BETWEEN_CHECKS = 5
"""Interval between checks for dead workers; torch's interval without a timeout."""

_NO_BATCH = "No batch came"
_OF_TORCH = ("DataLoader worker", "Pin memory thread")


class ResumableLoader(DataLoader[Any]):
    """A DataLoader over an :class:`EpochSampler`, whose state is the epoch and the batches taken from it.

    Prefetched batches do not count. In your own loop::

        loader.load_state_dict(state)
        for epoch in range(state["epoch"], epochs):
            loader.sampler.set_epoch(epoch)
            for batch in loader: ...

    Under a Trainer, which counts the steps itself, `steps_done` returns that count, and `end` the exception to raise
    after SIGTERM: a job-wide SIGTERM kills the workers too, so no batch will arrive.

    Raises:
        RuntimeError: A worker died or took longer than `timeout`; names the rank and the images of the step.
        BaseException: The exception of `end`, if the workers were terminated with the run. On several devices the last
            batch is repeated first: the devices agree to end when each of them begins a step.
        OSError: A file is missing or cannot be read; names the file and the rank.
    """

    steps_done: Callable[[], int] | None = None
    """Returns the number of batches of the epoch already used; called when a pass over the loader begins."""

    end: Callable[[], BaseException | None] | None = None
    """Returns the exception to raise if the run should end, else None; called when a worker died."""

    _epoch, _taken = 0, 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches of the sampler's epoch, from the position of a loaded state or `steps_done`.

        The position is read at the first batch: Lightning begins a pass before it knows epoch and step (its
        `estimated_stepping_batches` does so before a checkpoint is restored).
        """
        size, sampler = self.batch_size or 1, self.sampler
        if isinstance(sampler, EpochSampler):
            if self.steps_done is not None:
                sampler.start_at(sampler.epoch, self.steps_done() * size)
            self._epoch, first = sampler.next_position()
            self._taken = first // size
        for batch in _watched(self, super().__iter__, self._where, self.end):
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and batches taken from it; after a whole epoch, the start of the next one."""
        ended = self._taken >= len(self)
        return {"epoch": self._epoch + ended, "batches": 0 if ended else self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume in the epoch of ``state``; earlier epochs are done, later ones run in full."""
        if isinstance(self.sampler, EpochSampler):
            self.sampler.start_at(state["epoch"], state["batches"] * (self.batch_size or 1))

    def _where(self) -> tuple[str, list[str]]:
        if isinstance(self.sampler, EpochSampler):
            self.sampler.start_at(self._epoch, self._taken * (self.batch_size or 1))
        return f"step {self._taken} of epoch {self._epoch}", _images_of_batch(self, 0)


class PartialLoader(DataLoader[Any]):
    """A loader of whole images that leaves out bad images and batches without any good image.

    Several devices need the same number of steps: there the batch before or after an empty batch is repeated, and a
    repeated image counts once. Pass `collate_fn=collated`.

    Raises:
        RuntimeError: A worker died or took longer than `timeout`; names the rank and the images of the batch.
        BaseException: The exception of `end`, if on one device the workers were terminated with the run.
        OSError: A file is missing or cannot be read; names the file and the rank.
        BadImageError: On several devices, this one has no image that can be decoded.
    """

    end: Callable[[], BaseException | None] | None = None
    """Returns the exception to raise if the run should end, else None; only called on one device."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches with at least one image."""
        several, taken, owed = world_size() > 1, 0, 0
        last: Any = None

        def where() -> tuple[str, list[str]]:
            return f"batch {taken} of whole images", _images_of_batch(self, taken)

        for batch in _watched(self, super().__iter__, where, None if several else self.end):
            taken, owed = taken + 1, owed + 1
            last = last if batch is None else batch
            if batch is None and not several:
                owed = 0
            while last is not None and owed:
                owed -= 1
                yield last
        if owed:
            raise BadImageError(
                f"None of the {taken} batches of whole images of rank {rank()} contains an image that can be decoded, "
                "and the other devices wait for it: replace the images, leave them out, or use fewer devices."
            )


def is_worker_failure(error: RuntimeError) -> bool:
    """Whether the error means that a worker died or no batch arrived: a fault of the machine, not of the code."""
    return str(error).startswith((_NO_BATCH, *_OF_TORCH))


def _watched(
    loader: DataLoader[Any],
    begin: Callable[[], Iterator[Any]],
    where: Callable[[], tuple[str, list[str]]],
    end: Callable[[], BaseException | None] | None,
) -> Iterator[Any]:
    """The batches of `begin`, torch's own pass over the loader; errors name rank, step and images from `where`.

    Checks every few seconds whether the workers are alive: with a timeout, torch only checks when it expires.
    """
    timeout, batch, asked = loader.timeout, None, time.monotonic()
    loader.timeout = min(timeout, SECONDS_BETWEEN_CHECKS)
    try:
        batches = begin()
    finally:
        loader.timeout = timeout
    leave_out_of_torchs_sigchld_handler(batches)  # a worker's death is raised here, between steps
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            died = _dead_workers(batches, 1 if isinstance(error, (ConnectionError, EOFError)) else 0)
            ending = end() if died and end is not None else None
            several = world_size() > 1
            if ending is not None and not (several and batch is None):
                if several:
                    yield batch  # no step uses it
                raise ending from error
            if not died and str(error).startswith("DataLoader timed out"):
                if time.monotonic() < asked + timeout:
                    continue
                reason = f"DataLoader timed out after {timeout:g} seconds"
            elif died or str(error).startswith(_OF_TORCH):
                reason = _exit_reasons(died) or str(error).strip().rstrip(".")
            elif isinstance(error, OSError):
                raise _with_rank(error, where()[0]) from error
            else:
                raise
            raise RuntimeError(_no_batch(reason, *where())) from error
        yield batch
        asked = time.monotonic()


def _with_rank(error: OSError, step: str) -> OSError:
    """The error about a file, in one line, with the rank."""
    kind = next(kind for kind in (FileNotFoundError, PermissionError, OSError) if isinstance(error, kind))
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]  # a worker sends its whole traceback
    return kind(
        f"{reason.removeprefix(f'{kind.__name__}: ')} on rank {rank()}, in {step}: check this file and its disk, and "
        "resume from the last checkpoint."
    )


def _no_batch(reason: str, step: str, images: list[str]) -> str:
    return (
        f"{_NO_BATCH} on rank {rank()}: {reason}. {step.capitalize()} waited for {', '.join(images)}. Check these "
        "images and this machine's memory and disk, use fewer num_workers, or a longer timeout."
    )


def _dead_workers(batches: Any, seconds: float) -> list[BaseProcess]:
    """Workers that ended by a signal or with an error; waits up to `seconds` for one to end."""
    workers: dict[Any, BaseProcess] = {worker.sentinel: worker for worker in workers_of(batches)}
    for sentinel in wait(workers, seconds):
        workers[sentinel].join(1)  # the sentinel closes slightly before the process ends
    return [worker for worker in workers.values() if worker.exitcode]


def _exit_reasons(died: list[BaseProcess]) -> str:
    ends = []
    for worker in died:
        code = worker.exitcode or 0
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        ends.append(f"worker {worker.pid} {end}")
    return " and ".join(ends)


def _images_of_batch(loader: DataLoader[Any], number: int) -> list[str]:
    """Paths, or else keys, of the images of batch `number`, counted from the sampler's start.

    Unknown for a sampler that reshuffles at each pass.
    """
    size = loader.batch_size or 1
    if isinstance(loader.sampler, RandomSampler):
        return ["images in an unknown order"]
    keys = list(islice(loader.sampler, number * size, (number + 1) * size))
    records = getattr(loader.dataset, "records", None)
    indices = [key[1] if isinstance(key, tuple) else key for key in keys]
    return [str(index if records is None else records.path(index)) for index in indices]
