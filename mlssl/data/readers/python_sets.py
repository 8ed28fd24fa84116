"""Records of a Python data set: any torch Dataset, or one from Hugging Face's `datasets`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tqdm import tqdm

from mlssl.data.absent import absent_values
from mlssl.data.decoding import BadImageError, ImageArray, rgb_pixels
from mlssl.data.records import Records

Key = int | str

_OF_OBJECTS = ("category", "category_id", "categories", "label", "labels")
"""Keys of a detection target with the class ids of its objects."""


def read_dataset(
    dataset: Any,
    classes: Sequence[str] | None = None,
    *,
    image: Key | None = None,
    target: Key | None = None,
    targets: Sequence[Any] | None = None,
    target_kind: Literal["class_ids", "multi_hot"] = "class_ids",
    absent: int | None = None,
    channels: int = 3,
) -> Records:
    """Wrap a data set of (image, target) pairs or dictionaries for `MultiLabelDataModule`.

    Images are not copied: `dataset[index]` is called when one is needed. Targets are read once, here: only the column
    if the data set has columns, as with Hugging Face; otherwise every item, with a progress bar. Pass `targets` to
    avoid that.

    Args:
        dataset: Has a length, returns the same item i for `dataset[i]` every time, and can be pickled.
        classes: The L names, in id order. None: the names in a Hugging Face data set; for "multi_hot" "0", "1", …
        image: Key of the image in an item: 0 of a pair and "image" of a dictionary by default. An image is a Pillow
            image, a numpy uint8 array (H, W) or (H, W, C), or a tensor (C, H, W) of uint8 or of floats in 0–1.
        target: Key of the target in an item: 1 of a pair by default; none of a dictionary, which is then unlabelled.
        targets: The n targets, instead of `target`.
        target_kind: For "class_ids" a target is a list of ids in 0 … L − 1, one id, or a detection target, a dictionary
            with object ids under "category" or "label"; for "multi_hot" it is L numbers, 1 present, 0 absent, −1
            unknown. Lists are ambiguous, so the kind is not guessed.
        absent: −1 if −1 means absent in "multi_hot" targets; by default it means unknown.
        channels: C of the images.

    Returns:
        Items in data set order; ids and paths are 0 … n − 1.

    Raises:
        ValueError: The data set is empty, the targets have the wrong kind or number, or the ids have no names.
        TypeError: The data set has no length or items, or targets are not integers.
        KeyError: An item lacks a key.

    >>> pairs = [(np.zeros((4, 5, 3), np.uint8), [0, 2]), (np.ones((4, 5, 3), np.uint8), [])]
    >>> records = read_dataset(pairs, ["sky", "sea", "sun"])
    >>> records.labels.tolist(), records.image(1).max()
    ([[1, 0, 1], [0, 0, 0]], np.uint8(1))
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"the data set is a {type(dataset).__name__} without length or items: pass one with both, such as a list "
            "of its items"
        )
    if len(dataset) == 0:
        raise ValueError("an empty data set was given: pass one with images")
    first = dataset[0]
    is_pair = isinstance(first, (tuple, list))
    image_key: Key = (0 if is_pair else "image") if image is None else image
    target_key = 1 if is_pair and len(first) > 1 and target is None else target
    _item_at(first, image_key, "image")
    names = [str(index) for index in range(len(dataset))]
    settings: dict[str, Any] = {"decode": _Item(dataset, image_key, channels), "channels": channels}
    if targets is None and target_key is None:
        return Records(names, **settings)
    if targets is None:
        assert target_key is not None
        _item_at(first, target_key, "target")
        classes = classes or _named_classes(dataset, target_key)
        targets = list(_targets(dataset, target_key))
    if len(targets) != len(dataset):
        raise ValueError(f"{len(targets)} targets were given for {len(dataset)} images: pass one per image")
    if target_kind == "multi_hot":
        labels = np.stack([np.asarray(one) for one in targets])
        labels = np.where(labels == -1, absent_values(absent)["-1"], labels) if absent is not None else labels
        return Records(names, labels, classes or [str(column) for column in range(labels.shape[-1])], **settings)
    if target_kind != "class_ids":
        raise ValueError(f"target_kind={target_kind!r} is unknown: pass 'class_ids' or 'multi_hot'")
    if not classes:
        raise ValueError("targets are ids without class names: pass classes=[…], the name of each id")
    return Records(names, _labels_of_ids(targets, len(classes)), classes, **settings)


@dataclass(frozen=True)
class _Item:
    """Returns the image of the item that a path numbers; used in place of a file decoder."""

    dataset: Any
    image_key: Key
    channels: int

    def __call__(self, path: Path) -> ImageArray:
        try:
            image = self.dataset[int(path.name)][self.image_key]
            pixels = _pixels(image)
            is_gray = self.channels == 3 and pixels.shape[2] == 1
            return np.repeat(pixels, 3, axis=2) if is_gray else pixels
        except (MemoryError, KeyError):
            raise
        except Exception as error:  # data sets use many decoders
            raise BadImageError(
                f"item {path.name} of the {type(self.dataset).__name__} has no valid image ({error}): correct the item "
                "or leave it out"
            ) from error


def _pixels(image: Any) -> ImageArray:
    if isinstance(image, Image.Image):
        return rgb_pixels(image)
    if isinstance(image, torch.Tensor) and image.ndim == 3:
        image = image.detach().cpu()
        if image.is_floating_point():
            if not 0 <= float(image.min()) <= float(image.max()) <= 1:
                raise ValueError(
                    f"a float tensor with values from {float(image.min()):.3g} to {float(image.max()):.3g} was given: "
                    "leave normalisation to the module, and pass floats in 0–1 or uint8"
                )
            image = (image * 255).round().to(torch.uint8)
        return np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise ValueError(
            f"a {type(image).__name__} of {pixels.dtype} and shape {pixels.shape} was given: pass a Pillow image, "
            "uint8 (H, W, C), or a tensor (C, H, W) of uint8 or of floats in 0–1"
        )
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels


def _item_at(item: Any, key: Key, what: str) -> Any:
    try:
        return item[key]
    except (KeyError, IndexError, TypeError):
        there = ", ".join(map(repr, item)) if isinstance(item, dict) else f"a {type(item).__name__}"
        raise KeyError(f"an item has no {what} under {key!r}, it is {there}: pass {what}=…") from None


def _targets(dataset: Any, key: Key) -> Iterator[Any]:
    if hasattr(dataset, "select_columns"):  # Hugging Face: reads no images
        # An image transform may need columns that are not selected.
        for item in dataset.with_format(None).select_columns([key]):
            yield _categories(item[key])
        return
    for index in tqdm(range(len(dataset)), desc="reading targets", unit="item", disable=None):
        yield _categories(dataset[index][key])


def _named_classes(dataset: Any, key: Key) -> Sequence[str] | None:
    """Class names of a Hugging Face ClassLabel, alone or in a list."""
    feature = getattr(dataset, "features", {}).get(key) if hasattr(dataset, "features") else None
    feature = getattr(feature, "feature", feature)
    if isinstance(feature, dict):
        feature = next((feature[name] for name in _OF_OBJECTS if name in feature), None)
    names: Sequence[str] | None = getattr(getattr(feature, "feature", feature), "names", None)
    return names


def _categories(target: Any) -> Any:
    """Unique object ids of a detection target; other targets unchanged."""
    if not isinstance(target, dict):
        return target
    name = next((one for one in _OF_OBJECTS if one in target), None)
    if name is None:
        raise KeyError(f"a target has {', '.join(map(repr, target))}: expected object ids under 'category'")
    return sorted({int(one) for one in target[name]})


def _labels_of_ids(targets: Sequence[Any], num_classes: int) -> npt.NDArray[np.int8]:
    labels = np.zeros((len(targets), num_classes), dtype=np.int8)
    for row, target in enumerate(targets):
        ids = np.atleast_1d(np.asarray(target))
        if ids.size == 0:
            continue
        if ids.dtype.kind not in "iu":
            raise TypeError(f"target {row} is {target!r}: pass integer class ids, or target_kind='multi_hot'")
        if ids.ndim != 1 or ids.min() < 0 or ids.max() >= num_classes or len(set(ids.tolist())) < ids.size:
            raise ValueError(
                f"target {row} is {ids.tolist()}: pass each class id once, from 0 to {num_classes - 1}, or "
                "target_kind='multi_hot'"
            )
        labels[row, ids] = 1
    return labels
