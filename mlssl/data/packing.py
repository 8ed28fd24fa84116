"""Pack data sets into tar archives for `mlssl.data.readers.shards`."""

from __future__ import annotations

import io
import json
import os
import stat
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mlssl.atomic import check_free, folder_written_aside
from mlssl.data.paths import check_names
from mlssl.data.readers.shards import FORMAT, INDEX, LABELS, NUMBERS
from mlssl.data.records import Records

MEGABYTE = 10**6
ARCHIVE_MEGABYTES = 256
"""Large enough to keep the number of files low, small enough to resend one."""

_BLOCK = 512
"""Bytes of a tar header; files are padded to a multiple of it."""


def pack_shards(
    sets: Mapping[str, Records], folder: str | os.PathLike[str], megabytes: int = ARCHIVE_MEGABYTES
) -> None:
    """Pack the files of data sets, byte for byte, with their labels, classes and ids.

    A progress bar shows images/s and the time left. The same records give the same bytes.

    Args:
        sets: Split → records; their images are files below the root.
        folder: New folder for the splits. It is complete or absent; an existing one is not changed.
        megabytes: Archive size in millions of bytes, at least 1; a larger image gets its own archive.

    Raises:
        FileExistsError: `folder` exists.
        FileNotFoundError: An image is not a file.
        ValueError: `megabytes` is below 1, a path leaves the root, or two images have the same path.
        FullDiskError: The disk is full.
    """
    check_target(folder, megabytes)
    with folder_written_aside(folder) as aside:
        plans = {split: _planned(records, megabytes * MEGABYTE) for split, records in sets.items()}
        for split, records in sets.items():
            (aside / split).mkdir()
            _pack(records, plans[split], aside / split, split)


def check_target(folder: str | os.PathLike[str], megabytes: int) -> None:
    """Raise the FileExistsError or ValueError of `pack_shards` early, before large sets are read."""
    if megabytes < 1:
        raise ValueError(f"megabytes={megabytes} was given: pass the size of an archive, at least 1")
    check_free(folder)


class _Plan(NamedTuple):
    """Member names, and the images of each archive."""

    names: list[str]
    archives: list[range]


def _planned(records: Records, limit: int) -> _Plan:
    names: list[str] = []
    starts: list[int] = []
    filled = 0
    for row in range(len(records)):
        path = records.path(row)
        size = _file_size(path)
        names.append((path if records.root is None else path.relative_to(records.root)).as_posix())
        size = _BLOCK + _padded(size)
        if not starts or filled + size > limit:
            starts.append(row)
            filled = 0
        filled += size
    check_names(names, Path("Records" if records.root is None else records.root))
    if len(set(names)) < len(names):
        (twice, _), *_others = Counter(names).most_common(1)
        raise ValueError(f"{twice!r} is in {records!r} twice: leave one of them out")
    return _Plan(names, [range(*ends) for ends in zip(starts, [*starts[1:], len(names)], strict=True)])


def _file_size(path: Path) -> int:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):  # the latter for a path inside an archive
        found = None
    if found is None or not stat.S_ISREG(found.st_mode):
        raise FileNotFoundError(f"{str(path)!r} is not a file: pack a data set whose images are files")
    return found.st_size


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _pack(records: Records, plan: _Plan, folder: Path, split: str) -> None:
    lines: list[str] = []
    archives: list[dict[str, Any]] = []
    with tqdm(total=len(records), desc=f"packing {split}", unit="image", disable=None) as bar:
        for number, rows in enumerate(plan.archives):
            path = folder / f"{number:06d}.tar"
            with path.open("xb") as file, tarfile.open(fileobj=file, mode="w") as tar:
                for row in rows:
                    content = records.path(row).read_bytes()
                    member = tarfile.TarInfo(plan.names[row])
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                    start = file.tell() - _padded(len(content))
                    lines.append(_line(records, row, plan.names[row], (number, start, len(content))))
                    bar.update()
            archives.append({"name": path.name, "size": path.stat().st_size})
    head = {
        "format": FORMAT,
        "images": len(records),
        "classes": None if records.labels is None else records.classes,
        "archives": archives,
    }
    (folder / INDEX).write_text("\n".join([json.dumps(head), *lines, ""]), encoding="ascii")


def _line(records: Records, row: int, name: str, location: tuple[int, int, int]) -> str:
    line: dict[str, Any] = {"name": name, **dict(zip(NUMBERS, (*location, int(records.image_ids[row])), strict=True))}
    if records.labels is not None:
        line |= {key: np.flatnonzero(records.labels[row] == value).tolist() for key, value in LABELS.items()}
    return json.dumps(line)
