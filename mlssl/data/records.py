"""Records: the images of a data set and their labels.

One class for every data set: a reader is a function that returns `Records`. Three arrays and one buffer hold
everything, not one Python object per image, so copying records into loader workers is cheap.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mlssl.data.decoding import ImageArray, decode_rgb
from mlssl.data.paths import listing

Decode: TypeAlias = Callable[[Path], ImageArray]

OTHER_CLASSES = "labels of other classes"
"""Key of `left_out` that counts labels of classes not selected."""


class Records:
    """Images of a data set in a fixed order, each with file, id and labels.

    Args:
        paths: Paths of the n images, relative to `root` if given.
        labels: (n, L), bool or integer: 1 present, 0 absent, −1 unknown. None: unlabelled.
        classes: The L class names, in column order of `labels`; empty if unlabelled.
        image_ids: (n,), unique integers. None: 0 … n − 1.
        root: Folder of all paths, stored once.
        decode: Function from a path to pixels uint8 (H, W, C). Must be picklable for loader workers; raises
            `BadImageError` for an image that may be skipped with ``on_bad_image='skip'``.
        channels: C ≥ 1 of `decode`'s output; three are RGB.
        left_out: Counts of what the reader left out: extensions of image files, and kinds of labels. Kept as an
            attribute.

    Raises:
        ValueError: No images, a repeated id or class, a class without a name, labels of a wrong shape or value, class
            names that do not match them, or channels other than three without a custom `decode`.
        TypeError: Labels or ids are neither bool nor integer, or `paths` is a single path.

    An image without any object is a row of zeros; a class that no image shows is a column of zeros.

    >>> records = Records(["a.jpg", "b.jpg"], [[1, 0], [1, 1]], ["sky", "sea"], root="photos")
    >>> len(records), records.classes, records.path(1).as_posix()
    (2, ('sky', 'sea'), 'photos/b.jpg')
    """

    def __init__(
        self,
        paths: Iterable[str | os.PathLike[str]],
        labels: npt.ArrayLike | None = None,
        classes: Sequence[str] = (),
        *,
        image_ids: npt.ArrayLike | None = None,
        root: str | os.PathLike[str] | None = None,
        decode: Decode = decode_rgb,
        channels: int = 3,
        left_out: Mapping[str, int] | None = None,
    ) -> None:
        if isinstance(paths, (str, bytes)):
            raise TypeError(f"paths is one string, {paths!r}: pass a list of paths, or read_folder(root)")
        names = [os.fsencode(path) for path in paths]
        if not names:
            raise ValueError("records without images were given: pass at least one path")
        if channels < 1 or (channels != 3 and decode is decode_rgb):
            raise ValueError(
                f"records of {channels} channels were given, and files are decoded to RGB: also pass decode=…, a "
                "function from a path to uint8 (H, W, channels)"
            )
        self._buffer = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self.root = None if root is None else Path(root)
        self.decode = decode
        self.channels = channels
        self.left_out = dict(left_out or {})
        self.classes = tuple(classes)
        self.labels = _checked_labels(labels, len(names), self.classes)
        self.image_ids = _checked_ids(image_ids, len(names))

    def __len__(self) -> int:
        return len(self._ends)

    def __repr__(self) -> str:
        labels = "unlabelled" if self.labels is None else f"{len(self.classes)} classes"
        return f"Records({len(self)} images, {labels}, root={str(self.root)!r})"

    def path(self, index: int) -> Path:
        """Path of an image.

        Args:
            index: 0 … n − 1, or negative from the end.

        Raises:
            IndexError: The index is out of range.
        """
        name = Path(self._name(index))
        return name if self.root is None else self.root / name

    def image(self, index: int) -> ImageArray:
        """Decode an image: pixels uint8 (H, W, C).

        Args:
            index: 0 … n − 1, or negative from the end.

        Raises:
            IndexError: The index is out of range.
            BadImageError: The image cannot be decoded.
            TypeError: `decode` did not return uint8 (H, W, C).
        """
        path = self.path(index)
        pixels = self.decode(path)
        if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape[2:] == (self.channels,)):
            raise TypeError(
                f"decode returned {_describe(pixels)} for {str(path)!r}: return numpy "
                f"{'RGB ' if self.channels == 3 else ''}pixels of uint8 (H, W, {self.channels})"
            )
        return pixels

    def check_files(self) -> None:
        """Check that every file exists, with one listing per folder; does nothing for a custom `decode`.

        Raises:
            FileNotFoundError: Files are missing; gives their number and the first ones.
        """
        if self.decode is not decode_rgb:
            return
        paths = [self.path(index) for index in range(len(self))]
        listings = {parent: listing(parent) for parent in {path.parent for path in paths}}
        missing = [path for path in paths if path.name not in listings[path.parent] and not path.exists()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(self)} images do not exist, first {_shortened(missing, 3)}: "
                "correct the paths or the root, or leave them out"
            )

    def subset(self, indices: Sequence[int] | npt.NDArray[Any]) -> Records:
        """Keep some images, with their ids and labels, in the order of `indices`.

        Args:
            indices: Indices 0 … n − 1, each at most once, or a boolean mask (n,).

        Raises:
            IndexError: An index is out of range.
            ValueError: No index, or a repeated one.
        """
        kept = np.arange(len(self))[indices]
        return Records(
            [self._name(index) for index in kept],
            None if self.labels is None else self.labels[kept],
            self.classes,
            image_ids=self.image_ids[kept],
            root=self.root,
            decode=self.decode,
            channels=self.channels,
            left_out=self.left_out,
        )

    def with_classes(self, indices: Sequence[int] | npt.NDArray[Any]) -> Records:
        """Keep all images but only some classes, in the order of `indices`.

        Args:
            indices: Columns of `labels`, 0 … L − 1, or a boolean mask (L,).

        Raises:
            IndexError: A column is out of range.
            ValueError: The records are unlabelled, or no column is left.
        """
        if self.labels is None:
            raise ValueError(
                "these records have no labels to select classes from: use with_classes on labelled records"
            )
        kept = np.arange(len(self.classes))[indices]
        return Records(
            [self._name(index) for index in range(len(self))],
            self.labels[:, kept],
            [self.classes[index] for index in kept],
            image_ids=self.image_ids,
            root=self.root,
            decode=self.decode,
            channels=self.channels,
            left_out=self.left_out,
        )

    def _name(self, index: int) -> str:
        position = range(len(self))[index]
        start = int(self._ends[position - 1]) if position else 0
        return os.fsdecode(self._buffer[start : int(self._ends[position])])


def _checked_labels(
    labels: npt.ArrayLike | None, num_images: int, classes: Sequence[str]
) -> npt.NDArray[np.int8] | None:
    if labels is None:
        if classes:
            raise ValueError(f"{len(classes)} class names were given without labels: pass labels (n, L) or no classes")
        return None
    array = np.asarray(labels)
    if array.dtype.kind not in "biu":
        raise TypeError(f"labels of {array.dtype} were given: pass bool or integers, 1 present, 0 absent, -1 unknown")
    if array.ndim != 2 or len(array) != num_images or array.shape[1] == 0:
        raise ValueError(f"labels of shape {array.shape} were given for {num_images} images: pass (n, L), L at least 1")
    if array.shape[1] != len(classes):
        raise ValueError(
            f"{len(classes)} class names were given for {array.shape[1]} columns of labels: name each column"
        )
    check_class_names(classes)
    if array.max() > 1 or array.min() < -1:
        other = np.unique(array[(array < -1) | (array > 1)]).tolist()
        raise ValueError(f"labels have the values {_shortened(other)}: use only 1 present, 0 absent, -1 unknown")
    return array.astype(np.int8)


def check_class_names(classes: Sequence[str], source: str | os.PathLike[str] | None = None) -> None:
    """Check that each class has a unique name; `source` is the file that lists them, for the message.

    Raises:
        ValueError: A name is empty, not a string, or repeated, in any Unicode normal form.
    """
    where = "" if source is None else f"{os.fspath(source)!r}: "
    composed: dict[str, int] = {}
    for column, name in enumerate(classes):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{where}class {column} has the name {name!r}: give each class a non-empty name")
        first = composed.setdefault(unicodedata.normalize("NFC", name), column)
        if first != column:
            raise ValueError(
                f"{where}classes {first} and {column} are both named {name!r}: merge their columns, or give each its "
                "own name"
            )


def _checked_ids(image_ids: npt.ArrayLike | None, num_images: int) -> npt.NDArray[np.int64]:
    if image_ids is None:
        return np.arange(num_images, dtype=np.int64)
    array = np.asarray(image_ids)
    if array.dtype.kind not in "iu":
        raise TypeError(f"image ids of {array.dtype} were given: pass integers")
    if array.shape != (num_images,):
        raise ValueError(f"image ids of shape {array.shape} were given for {num_images} images: pass one id per image")
    values, counts = np.unique(array, return_counts=True)
    if len(values) < num_images:
        raise ValueError(
            f"image ids {_shortened(values[counts > 1].tolist())} occur more than once: give each image its own"
        )
    return array.astype(np.int64)


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"ndarray of {value.dtype} and shape {value.shape}"
    return f"of type {type(value).__name__}"


def _shortened(values: Sequence[object], limit: int = 5) -> str:
    return ", ".join(map(str, values[:limit])) + (", …" if len(values) > limit else "")
