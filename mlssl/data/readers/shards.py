"""Shards: images in tar archives of a few hundred megabytes, with an index in JSON Lines.

root/train/index.jsonl    a header line, then one line per image
root/train/000000.tar     the unchanged image files, under their own names
root/train/000001.tar
root/val/…                likewise

webdataset and any other tar tool can read the archives. The index gives archive and byte offset of each file, so any
image takes one read, in any order, from a disk or an object store.
"""

from __future__ import annotations

import io
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from fsspec.core import url_to_fs

from mlssl.data.decoding import ImageArray, decode_rgb_bytes
from mlssl.data.paths import check_names
from mlssl.data.records import Records, check_class_names
from mlssl.received import is_remote
from mlssl.waiting import READ_TIMEOUT, call_with_timeout

DecodeBytes: TypeAlias = Callable[[bytes, str], ImageArray]

INDEX = "index.jsonl"
FORMAT = "mlssl shards 1"
NUMBERS = ("archive", "offset", "size", "image_id")
"""For each image: archive number from 0, byte offset in it, size in bytes, id."""

LABELS = {"present": 1, "unknown": -1}
"""Lists of class columns from 0, if labelled; columns in neither list are absent."""


_ARCHIVE_NAME = "[A-Za-z0-9_-][A-Za-z0-9_.-]{0,250}"
"""Valid in folders and in addresses."""


def read_shards(
    root: str | os.PathLike[str],
    split: str = "train",
    *,
    decode: DecodeBytes = decode_rgb_bytes,
    channels: int = 3,
) -> Records:
    """Read the index of a packed set; images are read when needed.

    No file stays open between images, so loader workers share none, however they are started.

    Args:
        root: Folder with one folder per split, or its address for fsspec, such as "s3://bucket/photos",
            "gs://bucket/photos" or "https://host/photos". Credentials are fsspec's.
        split: Folder in it; "" for `root` itself.
        decode: Function from the bytes of an image file, and its name for messages, to pixels uint8 (H, W, C). Must be
            picklable; raises `BadImageError` for an image that may be skipped.
        channels: C that `decode` gives.

    Returns:
        Images, labels, classes and ids in packing order. A path is root/split/archive/name.

    Raises:
        FileNotFoundError: The index or an archive is missing.
        ValueError: The index is malformed, the size of an archive does not match it, or the kind of address is unknown.
        ImportError: The kind of address needs a package, such as s3fs.
        OSError: They cannot be read for another reason.
    """
    folder = _joined(root, split)
    index = f"{folder}/{INDEX}"
    archives, images = _parse(index, _content(folder, INDEX, index))
    check_class_names(images.classes, index)
    _check_archives(folder, archives, index)
    names = [f"{archives[archive].name}/{name}" for archive, name in zip(images.archives, images.names, strict=True)]
    return Records(
        names,
        images.labels,
        images.classes,
        image_ids=np.asarray(images.ids),
        root=folder,
        decode=_Member(folder, names, np.asarray(images.offsets), np.asarray(images.sizes), decode),
        channels=channels,
    )


def has_split(root: str | os.PathLike[str], split: str) -> bool:
    """Whether the split has an index.

    Args:
        root: See `read_shards`.
        split: See `read_shards`.

    Raises:
        ValueError: The kind of address is unknown.
        ImportError: The kind of address needs a package.
        OSError: It cannot be read.
    """
    folder = _joined(root, split)
    try:
        _content(folder, INDEX, f"{folder}/{INDEX}", 0, 1)
    except FileNotFoundError:
        return False
    return True


class _Archive(NamedTuple):
    name: str
    size: int


class _Images(NamedTuple):
    names: list[str]
    archives: array[int]
    offsets: array[int]
    sizes: array[int]
    ids: array[int]
    labels: npt.NDArray[np.int8] | None
    classes: Sequence[str]


class _Member:
    """Reads and decodes the archived file that a path names; used in place of a file decoder."""

    def __init__(
        self,
        folder: str,
        names: Iterable[str],
        offsets: npt.NDArray[np.int64],
        sizes: npt.NDArray[np.int64],
        decode: DecodeBytes,
    ) -> None:
        found = np.array([os.fsencode(name) for name in names])  # arrays, whose memory workers share
        order = np.argsort(found)
        self.folder = folder
        self.depth = len(Path(folder).parts)
        self.names, self.offsets, self.sizes = found[order], offsets[order], sizes[order]
        self.decode = decode

    def __call__(self, path: Path) -> ImageArray:
        name = "/".join(path.parts[self.depth :])
        row = min(int(np.searchsorted(self.names, os.fsencode(name))), len(self.names) - 1)
        if self.names[row] != os.fsencode(name):
            raise FileNotFoundError(f"{self.folder + '/' + INDEX!r} does not list {name!r}: pass a path of its records")
        start, size = int(self.offsets[row]), int(self.sizes[row])
        address = f"{self.folder}/{name}"
        archive = name.partition("/")[0]
        content = _content(self.folder, archive, address, start, start + size) if size else b""
        if len(content) != size:
            raise OSError(
                f"{self.folder + '/' + archive!r} returned {len(content)} bytes instead of {size} for {name!r}: copy "
                "the archive again, or use a server that supports range requests"
            )
        return self.decode(content, address)


def _joined(root: str | os.PathLike[str], split: str) -> str:
    return f"{os.fspath(root).rstrip('/')}/{split}".rstrip("/") or "/"


def _opened(address: str) -> tuple[Any, str]:
    try:
        system, path = call_with_timeout(url_to_fs, address) if is_remote(address) else url_to_fs(address)
    except ValueError as error:
        raise ValueError(
            f"cannot open {address!r} ({error}): pass a folder, or an address such as s3://bucket/photos"
        ) from error
    return system, path.rstrip("/")


@contextmanager
def _clear_errors(address: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no {address!r} ({error}): put it there, or pass the folder that mlssl pack wrote"
        ) from error
    except (PermissionError, ImportError, ValueError, MemoryError):
        raise
    except Exception as error:  # each kind of store has its own exceptions
        raise OSError(
            f"cannot read {address!r} ({type(error).__name__}: {error}): check the connection and the credentials, or "
            "copy the archives to a disk"
        ) from error


def _content(folder: str, name: str, address: str, start: int | None = None, end: int | None = None) -> bytes:
    """Bytes of a file in the folder, over this process's fsspec connection; `address` is for messages."""
    with _clear_errors(address):
        system, path = _opened(folder)
        wanted = f"{path}/{name}"
        if not is_remote(folder):
            return bytes(system.cat_file(wanted, start=start, end=end))
        if start is None:  # once the server has answered, a whole file may take long
            try:
                call_with_timeout(system.info, wanted)
            except FileNotFoundError as error:  # fsspec raises this for a lost connection too
                raise error.__cause__ or error from None
        seconds = READ_TIMEOUT if start is None else None
        return bytes(call_with_timeout(system.cat_file, wanted, start=start, end=end, seconds=seconds))


def _check_archives(folder: str, archives: Sequence[_Archive], index: str) -> None:
    with _clear_errors(f"{folder}/*.tar"):
        system, path = _opened(folder)
        names = [f"{path}/{archive.name}" for archive in archives]
        sizes = call_with_timeout(system.sizes, names) if is_remote(folder) else system.sizes(names)
    for archive, size in zip(archives, sizes, strict=True):
        if size is not None and size != archive.size:  # some servers do not report sizes
            raise ValueError(
                f"{folder + '/' + archive.name!r} has {size} bytes instead of the {archive.size} in {index!r}: copy it "
                "again"
            )


def _parse(index: str, content: bytes) -> tuple[list[_Archive], _Images]:
    lines = io.BytesIO(content)
    head = _json(next(lines, b""), index, 1)
    wrong = _wrong_head(head)
    if wrong:
        raise ValueError(
            f"line 1 of {index!r} {wrong}: pass the folder that mlssl pack wrote, or pack the images again"
        )
    archives = [_Archive(one["name"], one["size"]) for one in head["archives"]]
    num_classes = None if head["classes"] is None else len(head["classes"])
    names: list[str] = []
    numbers = {key: array("q") for key in NUMBERS}
    rows, columns, values = array("q"), array("q"), array("b")
    for number, text in enumerate(lines, start=2):
        line = _json(text, index, number)
        wrong = _wrong_line(line, archives, num_classes)
        if wrong:
            raise ValueError(f"line {number} of {index!r} {wrong}: pack the images again")
        for key, of_all in numbers.items():
            of_all.append(line[key])
        for key, value in LABELS.items():
            for column in line.get(key, ()):
                rows.append(len(names))
                columns.append(column)
                values.append(value)
        names.append(line["name"])
    if len(names) != head["images"]:
        raise ValueError(
            f"{index!r} lists {len(names)} images instead of {head['images']}: copy it again or pack the images again"
        )
    check_names(names, Path(index))
    of_archives, offsets, sizes, ids = numbers.values()
    if min(len(set(zip(of_archives, names, strict=True))), len(set(ids))) < len(names):
        raise ValueError(f"{index!r} repeats names or image ids: pack the images again")
    labels = None
    if num_classes is not None:
        labels = np.zeros((len(names), num_classes), dtype=np.int8)
        labels[np.asarray(rows), np.asarray(columns)] = np.asarray(values)
    return archives, _Images(names, of_archives, offsets, sizes, ids, labels, head["classes"] or ())


def _json(text: bytes, index: str, number: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"line {number} of {index!r} is not JSON ({error}): copy it again or pack the images again"
        ) from error


def _wrong_head(head: Any) -> str | None:
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        return f"does not have the format {FORMAT!r}"
    if not (_is_integer(head.get("images")) and head["images"] > 0):
        return "does not give the number of images"
    classes = head.get("classes", "none")  # null without labels
    if classes is not None and not (classes and _is_list_of(str, classes)):
        return "does not list class names"
    archives = head.get("archives")
    if not (archives and _is_list_of(dict, archives)):
        return "does not list archives"
    for one in archives:
        name = one.get("name")
        if not (isinstance(name, str) and re.fullmatch(_ARCHIVE_NAME, name) and _is_integer(one.get("size"))):
            return "has an archive without a plain name or a size"
    if len({one["name"] for one in archives}) < len(archives):
        return "lists an archive twice"
    return None


def _wrong_line(line: Any, archives: Sequence[_Archive], num_classes: int | None) -> str | None:
    if not (isinstance(line, dict) and all(_is_integer(line.get(key)) for key in NUMBERS)):
        return f"has no integers as {', '.join(NUMBERS)}"
    if not _is_name(line.get("name")):
        return f"has the name {line.get('name')!r}, which is not a file name"
    if not 0 <= line["archive"] < len(archives):
        return f"names archive {line['archive']} of {len(archives)}"
    if not 0 <= line["offset"] <= line["offset"] + line["size"] <= archives[line["archive"]].size or line["size"] < 0:
        return f"puts the image at {line['offset']}, {line['size']} bytes long, outside its archive"
    given = [line[key] for key in LABELS if key in line]
    if len(given) != (0 if num_classes is None else len(LABELS)):
        return "has labels without classes, or classes without labels"
    columns = [column for one in given if _is_list_of(int, one) for column in one]
    if not all(_is_list_of(int, one) for one in given) or any(not 0 <= one < (num_classes or 0) for one in columns):
        return f"has labels that are not indices of the {num_classes} classes"
    if len(set(columns)) < len(columns):
        return "has a label twice"
    return None


def _is_integer(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(type(one) is kind for one in value)


def _is_name(name: object) -> bool:
    if not isinstance(name, str) or "\0" in name or PurePosixPath(name).as_posix() != name:
        return False
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True
