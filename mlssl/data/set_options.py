"""Options of image sets, their locations and formats, shared by the data module and the commands.

This file has no heavy imports, so that `--help` is fast.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mlssl.choices import DatasetName


@dataclass(frozen=True, kw_only=True)
class SetOptions:
    """One set of images. None: not given.

    Args:
        dataset: Format of ROOT: synthetic, folder, coco, roboflow, voc, corel5k, manifest or shards.
        root: Folder of the images, or several: '[a, b]'.
        train_split: Split to read; the format's default if not given.
        annotations: Instead of ROOT: one or more COCO, Label Studio or CVAT files or manifests.
        images: Folder of the images of ANNOTATIONS; by default the folder of the file.
        classes: Classes to keep, in label order: '[cup, table]'.
        separator: Separator of names in a manifest, such as ';'.
        path_column: Column or key of the image paths.
        label_columns: Columns or keys of the labels.
        absent: What else means absent: -1, blank, or both; 0 if only 0.
        white: White level of gray images of more than 8 bits.
    """

    dataset: DatasetName | None = None
    root: str | list[str] | None = None
    train_split: str | None = None
    annotations: str | list[str] | None = None
    images: str | None = None
    classes: list[str] | None = None
    separator: str | None = None
    path_column: str | None = None
    label_columns: str | list[str] | None = None
    absent: int | str | list[int | str] | None = None
    white: float | None = None


@dataclass(frozen=True, kw_only=True)
class SplitOptions(SetOptions):
    """A training set and a validation set. None: not given.

    Args:
        val_split: Split to validate on, '' for none; the format's default if not given.
        val_annotations: Files of the validation set, as for ANNOTATIONS.
        val_images: Folder of its images; IMAGES by default.
        val_fraction: Fraction of the images to hold out for validation.
        min_images_per_class: Leave out classes with fewer train and val images.
    """

    val_split: str | None = None
    val_annotations: str | list[str] | None = None
    val_images: str | None = None
    val_fraction: float | None = None
    min_images_per_class: tuple[int, int] | None = None


Options = TypeVar("Options", bound=SetOptions)

COMMON = ("dataset", "root", "train_split", "val_split", "min_images_per_class")
"""Options that `--help` describes; it only lists the others."""


def plain_options(**given: Any) -> SplitOptions:
    """Build options from plain values; paths become text, which a checkpoint can store.

    Args:
        **given: Values by option name.

    Raises:
        ValueError: An option is unknown.
    """
    for name in given:
        if name not in SplitOptions.__dataclass_fields__:
            near = difflib.get_close_matches(name, SplitOptions.__dataclass_fields__, n=1)
            raise ValueError(
                f"a set has no option {name!r}{f', did you mean {near[0]!r}' if near else ''}: leave it out"
            )
    return SplitOptions(**{name: _plain(value) for name, value in given.items()})


def given_options(options: SetOptions) -> dict[str, Any]:
    """The options given, by name: arguments of `MultiLabelDataModule`."""
    values = {name: getattr(options, name, None) for name in SplitOptions.__dataclass_fields__}
    return {name: value for name, value in values.items() if value is not None}


def with_folder(options: Options, folder: str | list[str], dataset: DatasetName = "folder") -> Options:
    """Add an image folder to the options: the root, or the image folder of the annotations.

    Args:
        options: Options without either.
        folder: The folder, or several.
        dataset: Default format of the root.

    Raises:
        ValueError: The options have a folder already, or several were given for one annotation file.
    """
    if options.annotations is None:
        return replace(options, root=folder, dataset=options.dataset or dataset)
    if options.images is not None or not isinstance(folder, str):
        raise ValueError(
            f"{folder!r} and images={options.images!r} were given: with annotations, pass one image folder as the "
            "first argument"
        )
    return replace(options, images=folder)


def as_list(value: str | Sequence[str] | None) -> list[str]:
    """The values of an option that takes one or several.

    >>> as_list("a"), as_list(["a", "b"]), as_list(None)
    (['a'], ['a', 'b'], [])
    """
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, tuple):  # of numbers
        return value
    return [_plain(one) for one in value] if isinstance(value, list) else value
