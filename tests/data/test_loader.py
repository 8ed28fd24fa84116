"""The loader's position in an epoch: saved, resumed, and refused if it would mean something else."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler

from mlssl.data.datasets import EpochSampler
from mlssl.data.loader import ResumableLoader, _images_of_batch

IMAGES, BATCH = 11, 2


class Keys(Dataset[tuple[int, int]]):
    """Gives back the key it was asked for."""

    def __init__(self, images: int = IMAGES) -> None:
        self.images = images

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int]:
        return key


def loader(batch_size: int = BATCH, images: int = IMAGES, devices: int = 1, rank: int = 0, **settings: Any) -> Any:
    keys = Keys(images)
    sampler = EpochSampler(keys, num_replicas=devices, rank=rank, seed=3, drop_last=True)
    return ResumableLoader(keys, batch_size, sampler=sampler, drop_last=True, collate_fn=list, **settings)


def epoch(loader: Any, number: int) -> list[Any]:
    loader.sampler.set_epoch(number)
    return list(loader)


@pytest.mark.parametrize(("taken", "workers"), [*((taken, 0) for taken in range(1, 6)), (2, 2)])
def test_it_resumes_after_the_last_used_batch_regardless_of_prefetching(taken: int, workers: int) -> None:
    whole = [epoch(loader(), number) for number in range(3)]
    stopped = loader(num_workers=workers, **({"prefetch_factor": 2} if workers else {}))
    stopped.sampler.set_epoch(1)
    batches = iter(stopped)
    assert [next(batches) for _ in range(taken)] == whole[1][:taken]
    resumed = loader(num_workers=workers)
    resumed.load_state_dict(stopped.state_dict())
    if taken == 5:
        assert stopped.state_dict()["epoch"] == 2, "an epoch that is over is not gone on with"
        assert list(resumed) == whole[2]
    else:
        assert list(resumed) == whole[1][taken:]  # before the epoch is set, as in the Trainer
        assert epoch(resumed, 2) == whole[2]


def test_a_state_saved_after_a_resume_counts_from_the_start_of_the_epoch() -> None:
    stopped = loader()
    next(iter(stopped))
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    next(iter(resumed))
    assert resumed.state_dict() == {"epoch": 0, "batches": 2}


def test_the_trainers_count_is_read_at_the_first_batch() -> None:
    whole = epoch(loader(), 0)
    resumed = loader()
    resumed.steps_done = lambda: 3
    batches = iter(resumed)
    resumed.steps_done = lambda: 1
    assert list(batches) == whole[1:]


def test_devices_resume_together() -> None:
    for rank in (0, 1):
        whole = epoch(loader(devices=2, rank=rank), 0)
        resumed = loader(devices=2, rank=rank)
        resumed.load_state_dict({"epoch": 0, "batches": 1})
        assert list(resumed) == whole[1:]


def test_another_sampler_starts_from_the_beginning() -> None:
    fixed = ResumableLoader(Keys(), BATCH, sampler=SequentialSampler(Keys()), collate_fn=list)
    fixed.load_state_dict({"epoch": 0, "batches": 1})
    assert next(iter(fixed)) == [0, 1]


def test_the_images_of_a_batch_are_named_for_every_known_order() -> None:
    def keys(sampler: Any) -> list[str]:
        return _images_of_batch(DataLoader(Keys(), BATCH, sampler=sampler), 2)

    assert keys(SequentialSampler(Keys())) == ["4", "5"]
    assert keys(RandomSampler(Keys())) == ["images in an unknown order"]
    passed = epoch(loader(), 0)
    assert keys(EpochSampler(Keys(), num_replicas=1, rank=0, seed=3)) == [str(index) for _, index in passed[2]]
