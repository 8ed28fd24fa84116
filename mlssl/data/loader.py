"""Loaders that know their position in an epoch: to resume from it, and to name step, rank and images in an error."""

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

SECONDS_BETWEEN_LOOKS = 5
"""Between two checks whether a worker died; torch's interval where there is no timeout."""

_NO_BATCH = "No batch came"
_OF_TORCH = ("DataLoader worker", "Pin memory thread")


class ResumableLoader(DataLoader[Any]):
    """A DataLoader over an :class:`EpochSampler`, whose state is the epoch and the batches taken from it.

    Batches that workers have prefetched do not count. In your own loop::

        loader.load_state_dict(state)
        for epoch in range(state["epoch"], epochs):
            loader.sampler.set_epoch(epoch)
            for batch in loader: ...

    Under a Trainer, which counts the steps itself, `steps_done` gives that count, and `end` the exception to raise
    after SIGTERM: a job-wide SIGTERM ends the workers too, so that no batch comes.

    Raises:
        RuntimeError: If a worker dies or takes longer than `timeout`, with the rank and the images of the step.
        BaseException: What `end` gives, if workers are gone because the run was asked to end. On several devices the
            last batch comes once more first: the devices agree on the end when each of them begins a step.
        OSError: If a file is gone or cannot be read, with its name and the rank.
    """

    steps_done: Callable[[], int] | None = None
    """Gives the number of batches of the epoch that were used already; called when a pass over the loader begins."""

    end: Callable[[], BaseException | None] | None = None
    """Gives the exception to raise if the run was asked to end, else None; called when a worker is gone."""

    _epoch, _taken = 0, 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches of the sampler's epoch, from the position of a loaded state or `steps_done`.

        The position is read at the first batch: Lightning begins a pass before it knows epoch and step (its
        `estimated_stepping_batches` does so before a checkpoint is restored).
        """
        size, sampler = self.batch_size or 1, self.sampler
        if isinstance(sampler, EpochSampler):
            if self.steps_done is not None:
                sampler.start_in(sampler.epoch, self.steps_done() * size)
            self._epoch, first = sampler.go_on()
            self._taken = first // size
        for batch in _watched(self, super().__iter__, self._where, self.end):
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, and batches taken from it; that of a whole epoch is the beginning of the next one."""
        ended = self._taken >= len(self)
        return {"epoch": self._epoch + ended, "batches": 0 if ended else self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on in the middle of the epoch of ``state``; earlier ones are over, later ones whole."""
        if isinstance(self.sampler, EpochSampler):
            self.sampler.start_in(state["epoch"], state["batches"] * (self.batch_size or 1))

    def _where(self) -> tuple[str, list[str]]:
        if isinstance(self.sampler, EpochSampler):
            self.sampler.start_in(self._epoch, self._taken * (self.batch_size or 1))
        return f"step {self._taken} of epoch {self._epoch}", _images_of_batch(self, 0)


class PartialLoader(DataLoader[Any]):
    """A loader of whole images that leaves out bad images, and batches that hold no other.

    On several devices, which have to make the same number of steps, the batch before or after such a batch comes once
    more: an image that comes twice counts once. Pass `collate_fn=collated`.

    Raises:
        RuntimeError: If a worker dies or takes longer than `timeout`, with the rank and the images of the batch.
        BaseException: What `end` gives, if, on a single device, workers are gone because the run was asked to end.
        OSError: If a file is gone or cannot be read, with its name and the rank.
        BadImageError: On several devices, if this one gets no image that can be decoded.
    """

    end: Callable[[], BaseException | None] | None = None
    """Gives the exception to raise if the run was asked to end, else None; called on one device."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches that hold an image."""
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
                f"None of the {taken} batches of whole images of rank {rank()} holds an image that can be decoded, and "
                "the other devices wait for it: replace the images, leave them out, or use fewer devices."
            )


def is_of_workers(error: RuntimeError) -> bool:
    """Whether the error says that no batch came or a worker died: a fault of the machine, not of the code."""
    return str(error).startswith((_NO_BATCH, *_OF_TORCH))


def _watched(
    loader: DataLoader[Any],
    begin: Callable[[], Iterator[Any]],
    where: Callable[[], tuple[str, list[str]]],
    end: Callable[[], BaseException | None] | None,
) -> Iterator[Any]:
    """The batches of `begin`, torch's own pass over the loader; an error names rank, step and images by `where`.

    Checks every few seconds whether the workers live: with a timeout, torch checks only when it is over.
    """
    timeout, batch, asked = loader.timeout, None, time.monotonic()
    loader.timeout = min(timeout, SECONDS_BETWEEN_LOOKS)
    try:
        batches = begin()
    finally:
        loader.timeout = timeout
    leave_out_of_torchs_sigchld_handler(batches)  # a death is raised here, between two steps
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
                    yield batch  # which no step will use
                raise ending from error
            if not died and str(error).startswith("DataLoader timed out"):
                if time.monotonic() < asked + timeout:
                    continue
                said = f"DataLoader timed out after {timeout:g} seconds"
            elif died or str(error).startswith(_OF_TORCH):
                said = _said_of(died) or str(error).strip().rstrip(".")
            elif isinstance(error, OSError):
                raise _with_rank(error, where()[0]) from error
            else:
                raise
            raise RuntimeError(_no_batch(said, *where())) from error
        yield batch
        asked = time.monotonic()


def _with_rank(error: OSError, step: str) -> OSError:
    """An error that names a file, told in one line."""
    kind = next(kind for kind in (FileNotFoundError, PermissionError, OSError) if isinstance(error, kind))
    said = (str(error).strip() or type(error).__name__).splitlines()[-1]  # of a worker that sent its traceback
    return kind(
        f"{said.removeprefix(f'{kind.__name__}: ')} on rank {rank()}, in {step}: look at this file and its disk, and "
        "go on from the last checkpoint."
    )


def _no_batch(said: str, step: str, images: list[str]) -> str:
    return (
        f"{_NO_BATCH} on rank {rank()}: {said}. {step.capitalize()} waited for {', '.join(images)}. Look at these "
        "images and at the memory and the disk of this machine, use fewer num_workers, or a longer timeout."
    )


def _dead_workers(batches: Any, seconds: float) -> list[BaseProcess]:
    """Workers that have ended by a signal or with an error; waits up to `seconds` for one to end."""
    workers: dict[Any, BaseProcess] = {worker.sentinel: worker for worker in workers_of(batches)}
    for sentinel in wait(workers, seconds):
        workers[sentinel].join(1)  # what a process held is closed a moment before it has ended
    return [worker for worker in workers.values() if worker.exitcode]


def _said_of(died: list[BaseProcess]) -> str:
    ends = []
    for worker in died:
        code = worker.exitcode or 0
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        ends.append(f"worker {worker.pid} {end}")
    return " and ".join(ends)


def _images_of_batch(loader: DataLoader[Any], number: int) -> list[str]:
    """Images of the batch of this number, counted from the sampler's start: their paths, else their keys.

    The order of a sampler that shuffles anew at each pass is not known.
    """
    size = loader.batch_size or 1
    if isinstance(loader.sampler, RandomSampler):
        return ["images in an order that is not known"]
    keys = list(islice(loader.sampler, number * size, (number + 1) * size))
    records = getattr(loader.dataset, "records", None)
    indices = [key[1] if isinstance(key, tuple) else key for key in keys]
    return [str(index if records is None else records.path(index)) for index in indices]
