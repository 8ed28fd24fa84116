"""Loaders that say where they stand: in an epoch, to go on from there, and in an error, with rank and images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, RandomSampler

from mlssl.data.datasets import EpochSampler
from mlssl.data.images import BadImageError
from mlssl.distributed import rank, world_size

SECONDS_BETWEEN_LOOKS = 5
"""At which it is seen that a worker died, as torch does where there is no timeout."""

_NO_BATCH = "No batch came"


class ResumableLoader(DataLoader[Any]):
    """A DataLoader over an :class:`EpochSampler`, whose state is the epoch and the batches taken from it.

    What workers have fetched ahead does not count. In a loop of your own::

        loader.load_state_dict(state)
        for epoch in range(state["epoch"], epochs):
            loader.sampler.set_epoch(epoch)
            for batch in loader: ...

    Under a Trainer, which counts the steps itself, `steps_done` is set to that count.

    Raises:
        RuntimeError: Where a worker dies or takes longer than `timeout`, with the rank and the images of the step.
        OSError: Where a file is gone or cannot be read, with its name and the rank.
    """

    steps_done: Callable[[], int] | None = None
    """Gives the batches of the sampler's epoch that were used already; asked when a pass over the loader begins."""

    _epoch, _taken = 0, 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches of the sampler's epoch, from where a loaded state or `steps_done` ends.

        Everything happens at the first batch: Lightning begins a pass before it knows epoch and step (its
        `estimated_stepping_batches` does so before a checkpoint is restored).
        """
        size, sampler = self.batch_size or 1, self.sampler
        if isinstance(sampler, EpochSampler):
            if self.steps_done is not None:
                sampler.start_in(sampler.epoch, self.steps_done() * size)
            self._epoch, first = sampler.go_on()
            self._taken = first // size
        for batch in _saying_where(_looking_after_workers(self, super().__iter__), self._where, self.timeout):
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

    def say_where(self, error: BaseException) -> None:
        """Have an error of torch's about a worker name rank and images, where it did not come through a batch.

        torch raises the death of a worker wherever the main thread is: most often in the middle of a step.
        """
        if _is_of_torch(error):
            error.args = (_no_batch(error, *self._where()),)


class PartialLoader(DataLoader[Any]):
    """A loader of whole images whose batches may lack some, and which leaves out one that lacks all.

    On several devices, which have to make the same number of steps, the batch before or after such a one is given once
    more: an image that comes twice counts once. Pass `collate_fn=collated`.

    Raises:
        RuntimeError: Where a worker dies or takes longer than `timeout`, with the rank and the images of the batch.
        OSError: Where a file is gone or cannot be read, with its name and the rank.
        BadImageError: On several devices, where this one gets no image that can be decoded.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches that hold an image."""
        several, taken, owed = world_size() > 1, 0, 0
        last: Any = None

        def where() -> tuple[str, list[str]]:
            return f"batch {taken} of whole images", _images_of_batch(self, taken)

        for batch in _saying_where(_looking_after_workers(self, super().__iter__), where, self.timeout):
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
    return str(error).startswith(_NO_BATCH) or _is_of_torch(error)


def _looking_after_workers(loader: DataLoader[Any], begin: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """What `begin` gives, torch's own pass over the loader, that looks every few seconds whether its workers live.

    With a timeout torch looks at its end alone and else trusts a handler of SIGCHLD, which it sets once in a process;
    the Trainer takes it away at the end of a run, so that the next run would wait for a dead worker.
    """
    whole, loader.timeout = loader.timeout, min(loader.timeout, SECONDS_BETWEEN_LOOKS)
    try:
        return begin()
    finally:
        loader.timeout = whole


def _saying_where(batches: Iterator[Any], where: Callable[[], tuple[str, list[str]]], timeout: float) -> Iterator[Any]:
    """The same batches; an error names the rank and what `where` gives, the step and its images."""
    asked = time.monotonic()
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except OSError as error:  # it names the file
            kind = next(kind for kind in (FileNotFoundError, PermissionError, OSError) if isinstance(error, kind))
            said = (str(error).strip() or type(error).__name__).splitlines()[-1]  # of a worker that sent its traceback
            raise kind(
                f"{said.removeprefix(f'{kind.__name__}: ')} on rank {rank()}, in {where()[0]}: look at this file and "
                "its disk, and go on from the last checkpoint."
            ) from error
        except RuntimeError as error:
            if not _is_of_torch(error):
                raise
            if str(error).startswith("DataLoader timed out"):
                if time.monotonic() < asked + timeout:
                    continue  # all workers live
                error.args = (f"DataLoader timed out after {timeout:g} seconds",)
            raise RuntimeError(_no_batch(error, *where())) from error
        yield batch
        asked = time.monotonic()


def _is_of_torch(error: BaseException) -> bool:
    """Whether this is torch's word on its workers, which names no image."""
    return type(error) is RuntimeError and str(error).startswith("DataLoader ")


def _no_batch(error: BaseException, step: str, images: list[str]) -> str:
    return (
        f"{_NO_BATCH} on rank {rank()}: {str(error).strip().rstrip('.')}. {step.capitalize()} waited for "
        f"{', '.join(images)}. Look at these images and at the memory and the disk of this machine, use fewer "
        "num_workers, or a longer timeout."
    )


def _images_of_batch(loader: DataLoader[Any], number: int) -> list[str]:
    """Images of the batch of this number from where the sampler starts: their paths, else what the sampler calls them.

    A sampler that draws anew at each pass does not tell.
    """
    size = loader.batch_size or 1
    if isinstance(loader.sampler, RandomSampler):
        return ["images in an order that is not known"]
    keys = list(islice(loader.sampler, number * size, (number + 1) * size))
    records = getattr(loader.dataset, "records", None)
    indices = [key[1] if isinstance(key, tuple) else key for key in keys]
    return [str(index if records is None else records.path(index)) for index in indices]
