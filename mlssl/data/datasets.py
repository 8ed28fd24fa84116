"""Torch datasets of records: views for training, whole images for evaluation, and their sampling order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, default_collate

from mlssl.data.bad_images import BadImages
from mlssl.data.decoding import BadImageError
from mlssl.data.records import Records
from mlssl.views.blocks import BlockViews

MAX_TRIES = 100
"""Consecutive images tried as a substitute for a bad one before giving up."""

Key: TypeAlias = tuple[int, int] | tuple[int, int, int] | int
"""(epoch, index), (epoch, index, size of the views), or the index alone in epoch 0."""


class ViewDataset(Dataset[dict[str, Any]]):
    """Views of an image by key (epoch, index), which together with the seed fixes all randomness.

    A key (epoch, index, size) gives views of that size if all branches are Recipes.

    Args:
        records: Images, ids and optional labels.
        views: Makes the views of an image.
        seed: Seed of the views.
        bad: Record of images that cannot be decoded. In a batch, the next image that can be decoded and is not in the
            batch replaces such an image, so that a step has the same size on every device; the other items do not
            change. Another device may have the same image in that step; both then share its id. None: a bad image
            raises.
    """

    def __init__(self, records: Records, views: BlockViews, seed: int = 0, bad: BadImages | None = None) -> None:
        self.records = records
        self.views = views
        self.seed = seed
        self.bad = bad
        self._of_other_sizes: dict[int, BlockViews] = {}

    @property
    def num_blocks(self) -> int:
        """K, which the module's learning-rate scaling reads."""
        return self.views.num_blocks

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        """Output of `BlockViews.with_boxes`, `image_ids` and, if any, `labels`; an index alone is epoch 0."""
        epoch, index, size = _parts(key)
        return self._item(index, size, [self.seed, epoch, index])

    def __getitems__(self, keys: list[Key]) -> list[dict[str, Any]]:
        """The items of a batch, all different; called by the loader.

        Raises:
            BadImageError: An image cannot be decoded and `bad` is None, or none of many in a row can.
        """
        if self.bad is None:
            return [self[key] for key in keys]
        items, taken = [], {_parts(key)[1] for key in keys}
        for key in keys:
            epoch, index, size = _parts(key)
            item = _unless_bad(partial(self._item, index, size, [self.seed, epoch, index]), index, self.bad)
            items.append(self._substitute(epoch, index, size, taken) if item is None else item)
        return items

    def _substitute(self, epoch: int, bad_index: int, size: int, taken: set[int]) -> dict[str, Any]:
        """Another image for this slot of a batch, with its own random stream; adds its index to `taken`."""
        assert self.bad is not None
        tried = 0
        for step in range(1, len(self)):
            index = (bad_index + step) % len(self)
            if index in taken:
                continue
            # The last entry is never 0: a seed sequence ignores trailing zeros.
            seed = [self.seed, epoch, index, bad_index + 1]
            item = _unless_bad(partial(self._item, index, size, seed), index, self.bad)
            if item is not None:
                taken.add(index)
                return item
            tried += 1
            if tried == MAX_TRIES:
                break
        raise BadImageError(
            f"{self.records.path(bad_index)} cannot be decoded, and none of {tried} other images can replace it in the "
            "batch: check these images, or pass a smaller batch_size"
        )

    def _item(self, index: int, size: int, seed: list[int]) -> dict[str, Any]:
        made = self._views_of(size).with_boxes(self.records.image(index), np.random.default_rng(seed))
        return {**made, **_identity(self.records, index)}

    def _views_of(self, size: int) -> BlockViews:
        if size in (0, self.views.size):
            return self.views
        if size not in self._of_other_sizes:
            self._of_other_sizes[size] = self.views.with_size(size)
        return self._of_other_sizes[size]


class ImageDataset(Dataset[dict[str, Any]]):
    """Whole images resized to one size, without augmentation.

    Args:
        records: Images, ids and optional labels.
        size: Height and width in pixels.
        bad: Record of images that cannot be decoded; batches leave them out, see `mlssl.data.loader.PartialLoader`.
            None: a bad image raises.
    """

    def __init__(self, records: Records, size: tuple[int, int], bad: BadImages | None = None) -> None:
        self.records = records
        self.size = size
        self.bad = bad

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Image uint8 (C, H, W), image id and, if any, labels (L,)."""
        pixels = torch.from_numpy(self.records.image(index)).permute(2, 0, 1)
        return {"image": _resized(pixels, self.size), **_identity(self.records, index)}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """The items of a batch without bad images; called by the loader."""
        if self.bad is None:
            return [self[index] for index in indices]
        items = (_unless_bad(partial(self.__getitem__, index), index, self.bad) for index in indices)
        return [item for item in items if item is not None]

    def image_ids(self) -> list[int]:
        """Ids of the images in order, except known bad ones."""
        bad = set() if self.bad is None else set(self.bad.indices())
        return [int(image_id) for index, image_id in enumerate(self.records.image_ids) if index not in bad]


class EpochSampler(DistributedSampler[Any]):
    """A DistributedSampler that yields (epoch, index), so that a worker knows which epoch's views to make.

    The Trainer keeps a DistributedSampler and sets its epoch. With a `view_size` it yields (epoch, index, view_size),
    which also reaches running workers.
    """

    view_size: int | None = None
    """Size of the views from the next pass on; None for the size of the `BlockViews`."""

    _first_epoch, _first = 0, 0

    def start_at(self, epoch: int, first: int) -> None:
        """Resume at image `first` ≥ 0 of this device in `epoch`; earlier epochs are done."""
        self._first_epoch, self._first = epoch, first

    def next_position(self) -> tuple[int, int]:
        """Set the epoch of the next pass; return it and the index of its first image on this device."""
        # A resumed loop may not have set the epoch yet.
        if self.epoch <= self._first_epoch:
            self.set_epoch(self._first_epoch)
            return self._first_epoch, self._first
        return self.epoch, 0

    def __iter__(self) -> Iterator[Any]:
        epoch, first = self.next_position()
        size = () if self.view_size is None else (self.view_size,)
        return ((epoch, index, *size) for index in islice(super().__iter__(), first, None))


def collated(items: list[dict[str, Any]]) -> Any:
    """Collate items of an `ImageDataset`; None for no items."""
    return default_collate(items) if items else None


def _parts(key: Key) -> tuple[int, int, int]:
    """Epoch, index and size; size 0 is the default."""
    if isinstance(key, int):
        return 0, key, 0
    return (*key, 0) if len(key) == 2 else key


def _unless_bad(make: Callable[[], dict[str, Any]], index: int, bad: BadImages) -> dict[str, Any] | None:
    if index in bad:
        return None
    try:
        return make()
    except BadImageError:
        bad.add(index)
        return None


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
