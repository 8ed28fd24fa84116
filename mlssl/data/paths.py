"""Check listed image paths: they stay in their folder, and the files exist."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

IMAGE_EXTENSIONS = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff"),
    *(".heic", ".heif", ".webp"),
)
"""Extensions of image files."""


class ListedImages(NamedTuple):
    """Listed images as found on disk."""

    names: list[str]
    """Paths in the folder, spelled as on disk: a list may compose a Unicode name that the disk decomposes."""

    left_out: dict[str, int]
    """Extension → number of unlisted image files in the same folders."""


def check_files(folder: Path, names: Sequence[str], source: Path) -> ListedImages:
    """Check that images exist with one listing per folder, not one lookup per image: minutes faster on a network.

    Args:
        folder: Folder of the images.
        names: Paths in it, with "/" as separator.
        source: The file that lists them, for the message.

    Returns:
        The names in order, and counts of unlisted images.

    Raises:
        FileNotFoundError: The folder or an image is missing.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}: put the images of {str(source)!r} there")
    parts: list[Sequence[str]] = [name.rpartition("/")[::2] for name in names]
    listings = {parent: listing(folder / parent) for parent in {parent for parent, _ in parts}}
    missing = [index for index, (parent, file) in enumerate(parts) if file not in listings[parent]]
    found = list(names)
    if missing:  # perhaps spelled in another Unicode normal form
        composed = {
            parent: {unicodedata.normalize("NFC", file): file for file in there} for parent, there in listings.items()
        }
        for index in missing:
            parent, file = parts[index]
            there = composed[parent].get(unicodedata.normalize("NFC", file))
            if there is not None:
                found[index] = f"{parent}/{there}" if parent else there
                parts[index] = (parent, there)
        missing = [index for index in missing if parts[index][1] not in listings[parts[index][0]]]
    if missing:
        first = ", ".join(names[index] for index in missing[:3]) + (", …" if len(missing) > 3 else "")
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images listed in {str(source)!r} are not in {str(folder)!r}, first "
            f"{first}: put them there or drop them from that file"
        )
    listed: dict[str, set[str]] = {parent: set() for parent in listings}
    for parent, file in parts:
        listed[parent].add(file)
    others = (file for parent, there in listings.items() for file in there - listed[parent])
    return ListedImages(found, count_extensions(file for file in others if extension(file) in IMAGE_EXTENSIONS))


def extension(name: str) -> str:
    """Extension of a name in lower case, with its dot; empty if there is none.

    >>> extension("a/b.JPG"), extension("a.b/c")
    ('.jpg', '')
    """
    return posixpath.splitext(name)[1].lower()


def count_extensions(names: Iterable[str]) -> dict[str, int]:
    """Extension → number of names, the most frequent first."""
    return dict(Counter(map(extension, names)).most_common())


def first_repeated(names: Sequence[str]) -> tuple[int, int] | None:
    """Indices of the first repeated path, in any spelling: its first occurrence and the repeat.

    >>> first_repeated(["a.jpg", "b//c.jpg", "./a.jpg"])
    (0, 2)
    """
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        spelled = posixpath.normpath(name) if "/" in name else name
        if not spelled.isascii():
            spelled = unicodedata.normalize("NFC", spelled)
        first = seen.setdefault(spelled, index)
        if first != index:
            return first, index
    return None


def check_names(names: Sequence[Any], source: Path) -> list[str]:
    """Check that image names are paths below their folder.

    Args:
        names: Image names from `source`.
        source: The file that lists them, for the message.

    Raises:
        ValueError: A name is not a string, is empty or absolute, or contains "..".
    """
    for name in names:
        if not isinstance(name, str) or _leaves_folder(name):
            raise ValueError(
                f"{str(source)!r} names the image {name!r}: expected a path inside the image folder, without '..' or a "
                "leading '/'"
            )
    return list(names)


def listing(folder: Path) -> set[str]:
    """Names of all entries of a folder; empty if it does not exist."""
    if not folder.is_dir():
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries}


def _leaves_folder(name: str) -> bool:
    if "/" not in name and "\\" not in name and ":" not in name:
        return name in ("", ".", "..")
    return any(
        kind(name).is_absolute() or kind(name).drive or ".." in kind(name).parts
        for kind in (PurePosixPath, PureWindowsPath)
    )
