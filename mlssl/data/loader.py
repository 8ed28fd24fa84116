"""A DataLoader that says where in an epoch it stands, and goes on from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from mlssl.data.datasets import EpochSampler
from mlssl.distributed import rank


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
        batches = super().__iter__()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader "):  # torch's word on its workers, which names no image
                    raise
                raise RuntimeError(
                    f"No batch came on rank {rank()}: {error}. Step {self._taken} of epoch {self._epoch} waited for "
                    f"{', '.join(self._images_of_step())}. Look at these images and at the memory and the disk of this "
                    "machine, use fewer num_workers, or a longer timeout."
                ) from error
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

    def _images_of_step(self) -> list[str]:
        """The images that the next step takes: their paths where they have some, else what the sampler calls them."""
        size = self.batch_size or 1
        if isinstance(self.sampler, EpochSampler):
            self.sampler.start_in(self._epoch, self._taken * size)
        keys = list(islice(self.sampler, size))
        records = getattr(self.dataset, "records", None)
        indices = [key[1] if isinstance(key, tuple) else key for key in keys]
        return [str(index if records is None else records.path(index)) for index in indices]
