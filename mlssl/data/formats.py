"""Data sets by the names of their formats: which reader, which splits, and both sets of a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mlssl.choices import DatasetName
from mlssl.data.decoding import decode_rgb, decode_rgb_bytes
from mlssl.data.readers.coco import read_coco
from mlssl.data.readers.corel5k import frequent_labels, read_corel5k
from mlssl.data.readers.folder import read_folder
from mlssl.data.readers.manifest import read_manifest
from mlssl.data.readers.shards import has_split, read_shards
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.data.readers.voc import read_voc
from mlssl.data.records import Records

NUM_SCENES = {"train": 2000, "test": 500}
"""Synthetic scenes of a split: a few minutes of training, and a test set that is read in seconds."""


def check_source(dataset: str, root: str | None) -> None:
    """Raise ValueError if there is no such format, or it needs a root and got none, or got one and needs none."""
    if dataset not in _FORMATS:
        raise ValueError(f"dataset={dataset!r} is unknown: pass one of {', '.join(_FORMATS)}, or train=Records(…).")
    if root is None and dataset != "synthetic":
        raise ValueError(f"dataset={dataset!r} needs the folder that holds it: pass root (--data.root FOLDER).")
    if root is not None and dataset == "synthetic":
        others = ", ".join(name for name in _FORMATS if name != "synthetic")
        raise ValueError(f"root={root!r} was given, and drawn scenes have no files: say which dataset it is, {others}.")


def read_sets(
    dataset: DatasetName,
    root: str | None = None,
    train_split: str | None = None,
    val_split: str | None = None,
    min_images_per_class: tuple[int, int] | None = None,
    **of_files: Any,
) -> tuple[Records, Records | None]:
    """Read the training set and, unless ``val_split`` is ``""`` or the format has none by default, the val set.

    Args:
        dataset: Format.
        root: Folder or address that its reader describes; not for ``synthetic``.
        train_split: By default that of the format.
        val_split: Likewise.
        min_images_per_class: Keep only classes with at least so many train and so many val images.
        **of_files: How the lists of a ``manifest`` are written, as `read_manifest` takes it, and what is ``white``
            in images of more than 8 bits.

    Raises:
        ValueError: On unknown splits, and if no class is frequent enough.
        FileNotFoundError: If a folder or file is missing.
    """
    source, root = _FORMATS[dataset], root or "."
    white = of_files.pop("white", None)
    if white is not None:
        decode = decode_rgb_bytes if dataset == "shards" else decode_rgb
        of_files["decode"] = partial(decode, white=white)
    default = source.val(root) if callable(source.val) else source.val
    read = partial(source.read, **of_files)
    train = read(root, source.train if train_split is None else train_split, None)
    split = default if val_split is None else val_split
    try:
        val = read(root, split, train.classes or None) if split else None
    except FileNotFoundError as error:
        if val_split is not None:
            raise
        missing = str(error).rpartition(": ")[0]  # not the reader's advice, which might be the training set
        raise FileNotFoundError(
            f'there is no validation set {split!r} ({missing}): pass val_split="" (--data.val_split "") to train '
            "without one, or a val_split whose images are not trained on"
        ) from error
    if min_images_per_class is None:
        return train, val
    least_train, least_val = min_images_per_class
    if val is None:
        raise ValueError(
            f"min_images_per_class={min_images_per_class} counts val images too, and there are none: leave it out."
        )
    kept = frequent_labels(train, val, least_train, least_val)
    if not kept:
        raise ValueError(f"No class has {least_train} train and {least_val} val images: lower min_images_per_class.")
    return train.with_classes(kept), val.with_classes(kept)


class _Format(NamedTuple):
    read: Callable[..., Records]
    """Root, split and, for a val set, the classes of the training set, which a manifest does not list itself."""
    train: str
    val: str | Callable[[str], str]
    """A split, or a function of the root that tells it."""


_FORMATS = {
    "synthetic": _Format(
        lambda _root, split, _: synthetic_scenes(split, count=NUM_SCENES.get(split, 1)), "train", "test"
    ),
    "coco": _Format(lambda root, split, _, **how: read_coco(root, split, **how), "train2017", "val2017"),
    "voc": _Format(lambda root, split, _: read_voc(root, split), "2012/trainval", "2007/test"),
    "corel5k": _Format(lambda root, split, _: read_corel5k(root, split), "train", "test"),
    "manifest": _Format(
        lambda root, split, classes, **how: read_manifest(Path(root) / split, classes, **how),
        "train.csv",
        "val.csv",
    ),
    "folder": _Format(lambda root, split, _, **how: read_folder(Path(root) / split, **how), "", ""),
    "shards": _Format(
        lambda root, split, _, **how: read_shards(root, split, **how),
        "train",
        lambda root: "val" if has_split(root, "val") else "",
    ),
}
