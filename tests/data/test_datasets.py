"""Views and whole images of records, and the order in which they come."""

from __future__ import annotations

import pickle

import numpy as np
import torch

from mlssl.data.datasets import EpochSampler, ImageDataset, ViewDataset
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.views.blocks import BlockViews


def test_an_image_of_the_asked_size_stays_as_it_is_and_a_smaller_one_is_averaged() -> None:
    records = synthetic_scenes(size=64, count=1)
    image = records.image(0)
    assert np.array_equal(ImageDataset(records, (64, 64))[0]["image"].permute(1, 2, 0), image)
    halved = ImageDataset(records, (32, 32))[0]["image"].permute(1, 2, 0).numpy().astype(float)
    assert np.abs(halved - image.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))).mean() < 4


def test_views_do_not_depend_on_what_was_drawn_before() -> None:
    dataset = ViewDataset(synthetic_scenes(size=32, count=10), BlockViews(16), seed=5)
    alone = dataset[2, 7]["views"]
    torch.manual_seed(9)
    for key in ((2, 6), (0, 7), 3):
        dataset[key]
    assert torch.equal(dataset[2, 7]["views"], alone)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[2, 7]["views"], alone)
    assert torch.equal(dataset[7]["views"], dataset[0, 7]["views"])


def test_the_sampler_hands_out_the_epoch_with_every_image_once() -> None:
    dataset = ViewDataset(synthetic_scenes(size=32, count=10), BlockViews(16))
    sampler = EpochSampler(dataset, num_replicas=1, rank=0)
    sampler.set_epoch(3)
    keys = list(sampler)
    assert sorted(keys) == [(3, index) for index in range(10)]
    sampler.set_epoch(4)
    assert [index for _, index in sampler] != [index for _, index in keys]
