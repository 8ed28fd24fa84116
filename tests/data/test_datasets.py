"""Views and whole images of records, and their order."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from mlssl.data.batches import check_view_batch
from mlssl.data.datasets import EpochSampler, ImageDataset, ViewDataset
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.views.blocks import BlockViews
from mlssl.views.recipe import Recipe


def test_an_image_of_the_target_size_is_unchanged_and_a_larger_one_is_antialiased() -> None:
    records = synthetic_scenes(size=64, count=1)
    image = records.image(0)
    assert np.array_equal(ImageDataset(records, (64, 64))[0]["image"].permute(1, 2, 0), image)
    halved = ImageDataset(records, (32, 32))[0]["image"].permute(1, 2, 0).numpy().astype(float)
    assert np.abs(halved - image.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))).mean() < 4


def test_views_do_not_depend_on_earlier_samples() -> None:
    dataset = ViewDataset(synthetic_scenes(size=32, count=10), BlockViews(16), seed=5)
    alone = dataset[2, 7]["views"]
    torch.manual_seed(9)
    for key in ((2, 6), (0, 7), 3):
        dataset[key]
    assert torch.equal(dataset[2, 7]["views"], alone)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[2, 7]["views"], alone)
    assert torch.equal(dataset[7]["views"], dataset[0, 7]["views"])


def test_an_item_contains_views_boxes_and_optional_local_views() -> None:
    records = synthetic_scenes(size=32, count=3)
    views = BlockViews(16, branches=[Recipe()] * 3, local_views={"count": 5, "size": 8})
    item = ViewDataset(records, views, seed=5)[1, 2]
    made = views.with_boxes(records.image(2), np.random.default_rng([5, 1, 2]))
    assert item.keys() == {*made, "image_ids", "labels"}
    assert all(torch.equal(item[name], made[name]) for name in made)
    batch = default_collate([ViewDataset(records, views)[0, index] for index in range(3)])
    check_view_batch(batch)
    assert batch["boxes"].shape == (3, 3, 4, 4)
    assert batch["local_views"].shape == (3, 5, 3, 8, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_view_size_applies_from_the_next_pass_even_in_persistent_workers(workers: int) -> None:
    records = synthetic_scenes(size=32, count=6)
    dataset = ViewDataset(records, BlockViews(16, local_views={"count": 2, "size": 8}))
    sampler = EpochSampler(dataset, num_replicas=1, rank=0)
    loader = DataLoader(dataset, 2, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    passes = []
    for size in (None, 24, None, 32):
        sampler.view_size = size
        passes.append(list(loader))
    assert [{batch["views"].shape[-1] for batch in batches} for batches in passes] == [{16}, {24}, {16}, {32}]
    for batches in passes:
        for batch, first in zip(batches, passes[0], strict=True):
            for name in ("boxes", "local_views", "image_ids"):
                assert torch.equal(batch[name], first[name])
    assert torch.equal(passes[2][0]["views"], passes[0][0]["views"])
    index = int(passes[1][0]["image_ids"][0])
    direct = BlockViews(24)(records.image(index), np.random.default_rng([0, 0, index]))
    assert torch.equal(passes[1][0]["views"][0], direct)


def test_another_size_is_refused_for_branches_of_fixed_size() -> None:
    dataset = ViewDataset(synthetic_scenes(size=32, count=1), BlockViews(16, branches=[black]))
    assert dataset[0, 0, 16]["views"].shape[-1] == 16
    with pytest.raises(
        ValueError, match=r"black.* is not a Recipe and returns views of 16 pixels, but 24 was requested"
    ):
        dataset[0, 0, 24]


def black(block: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return np.zeros((3, 16, 16), np.uint8)


def test_the_sampler_yields_the_epoch_and_every_image_once() -> None:
    dataset = ViewDataset(synthetic_scenes(size=32, count=10), BlockViews(16))
    sampler = EpochSampler(dataset, num_replicas=1, rank=0)
    sampler.set_epoch(3)
    keys = list(sampler)
    assert sorted(keys) == [(3, index) for index in range(10)]
    sampler.set_epoch(4)
    assert [index for _, index in sampler] != [index for _, index in keys]
