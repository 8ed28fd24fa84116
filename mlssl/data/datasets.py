"""Torch datasets of records: views to train on, whole images to evaluate on, and the order in which they come."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from mlssl.data.records import Records
from mlssl.views.blocks import BlockViews


class ViewDataset(Dataset[dict[str, Any]]):
    """Views of an image under a key (epoch, index), which with the seed determines every draw.

    Args:
        records: Images, ids and perhaps labels.
        views: The cutting and augmenting.
        seed: Of the draws.
    """

    def __init__(self, records: Records, views: BlockViews, seed: int = 0) -> None:
        self.records = records
        self.views = views
        self.seed = seed

    @property
    def num_blocks(self) -> int:
        """K, which the module's learning-rate scaling reads."""
        return self.views.num_blocks

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        """Views uint8 (A, K, 3, S, S), image id and, where there are, labels (L,); of epoch 0 under an index alone."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        generator = np.random.default_rng([self.seed, epoch, index])
        return {"views": self.views(self.records.image(index), generator), **_identity(self.records, index)}


class ImageDataset(Dataset[dict[str, Any]]):
    """Whole images resized to one size, without augmentation.

    Args:
        records: Images, ids and perhaps labels.
        size: Height and width in pixels.
    """

    def __init__(self, records: Records, size: tuple[int, int]) -> None:
        self.records = records
        self.size = size

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Image uint8 (3, H, W), image id and, where there are, labels (L,)."""
        pixels = torch.from_numpy(self.records.image(index)).permute(2, 0, 1)
        return {"image": _resized(pixels, self.size), **_identity(self.records, index)}


class EpochSampler(DistributedSampler[Any]):
    """A DistributedSampler that hands out (epoch, index), so that a worker knows the epoch it draws for.

    As a DistributedSampler it is left in place by the Trainer, which also tells it the epoch.
    """

    _first_epoch, _first = 0, 0

    def start_in(self, epoch: int, first: int) -> None:
        """Begin `epoch` with the image `first` ≥ 0 of this device, and no earlier epoch: the rest of a stopped run."""
        self._first_epoch, self._first = epoch, first

    def go_on(self) -> tuple[int, int]:
        """Settle the epoch of the next pass; gives it and the place of its first image on this device."""
        # A loop that goes on need not have told the epoch yet.
        if self.epoch <= self._first_epoch:
            self.set_epoch(self._first_epoch)
            return self._first_epoch, self._first
        return self.epoch, 0

    def __iter__(self) -> Iterator[Any]:
        epoch, first = self.go_on()
        return ((epoch, index) for index in islice(super().__iter__(), first, None))


def _identity(records: Records, index: int) -> dict[str, Any]:
    identity: dict[str, Any] = {"image_ids": int(records.image_ids[index])}
    if records.labels is not None:
        identity["labels"] = torch.from_numpy(np.array(records.labels[index]))
    return identity


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    if pixels.shape[1:] == size:
        return pixels.contiguous()
    from torchvision.transforms.v2.functional import resize

    resized: Tensor = resize(pixels, list(size), antialias=True)
    return resized
