"""Checks of the image paths that a data set's files list: they stay in their folder, and the files exist."""

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
"""Ends of the names of image files."""


class Files(NamedTuple):
    """Images that a file lists, as they are found on the disk."""

    names: list[str]
    """Paths in their folder, spelled as there: a name may be composed in the list and decomposed on the disk."""

    left_out: dict[str, int]
    """Extension → number of image files beside them that are not listed."""


def check_files(folder: Path, names: Sequence[str], source: Path) -> Files:
    """Check that images exist, with one listing of a folder instead of one look-up an image: minutes less on a network.

    Args:
        folder: Where they should lie.
        names: Paths in it, with "/" between their parts.
        source: The file that names them, for the message.

    Returns:
        The names in their order, and what else lies beside them.

    Raises:
        FileNotFoundError: The folder or an image is missing.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}: put the images there that {str(source)!r} names")
    parts: list[Sequence[str]] = [name.rpartition("/")[::2] for name in names]
    listings = {parent: listing(folder / parent) for parent in {parent for parent, _ in parts}}
    missing = [place for place, (parent, file) in enumerate(parts) if file not in listings[parent]]
    found = list(names)
    if missing:  # perhaps spelled in another of Unicode's normal forms
        composed = {
            parent: {unicodedata.normalize("NFC", file): file for file in there} for parent, there in listings.items()
        }
        for place in missing:
            parent, file = parts[place]
            there = composed[parent].get(unicodedata.normalize("NFC", file))
            if there is not None:
                found[place] = f"{parent}/{there}" if parent else there
                parts[place] = (parent, there)
        missing = [place for place in missing if parts[place][1] not in listings[parts[place][0]]]
    if missing:
        first = ", ".join(names[place] for place in missing[:3]) + (", …" if len(missing) > 3 else "")
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images that {str(source)!r} names are not in {str(folder)!r}, "
            f"first {first}: put them there or drop them from "
            "that file"
        )
    listed: dict[str, set[str]] = {parent: set() for parent in listings}
    for parent, file in parts:
        listed[parent].add(file)
    others = (file for parent, there in listings.items() for file in there - listed[parent])
    return Files(found, count_extensions(file for file in others if extension(file) in IMAGE_EXTENSIONS))


def extension(name: str) -> str:
    """End of a name in lower case, with its dot; nothing where there is none.

    >>> extension("a/b.JPG"), extension("a.b/c")
    ('.jpg', '')
    """
    return posixpath.splitext(name)[1].lower()


def count_extensions(names: Iterable[str]) -> dict[str, int]:
    """Extension → number of names, the most frequent first."""
    return dict(Counter(map(extension, names)).most_common())


def first_repeated(names: Sequence[str]) -> tuple[int, int] | None:
    """Positions of the first path that comes twice, in whatever spelling, and of its first occurrence before it.

    >>> first_repeated(["a.jpg", "b//c.jpg", "./a.jpg"])
    (0, 2)
    """
    seen: dict[str, int] = {}
    for place, name in enumerate(names):
        spelled = posixpath.normpath(name) if "/" in name else name
        if not spelled.isascii():
            spelled = unicodedata.normalize("NFC", spelled)
        first = seen.setdefault(spelled, place)
        if first != place:
            return first, place
    return None


def check_names(names: Sequence[Any], source: Path) -> list[str]:
    """Check that names of images are paths below their folder: what a file lists must not lead anywhere else.

    Args:
        names: Of images, as `source` gives them.
        source: The file that names them, for the message.

    Raises:
        ValueError: A name that is no string, is empty, is absolute or contains "..".
    """
    for name in names:
        if not isinstance(name, str) or _leaves_folder(name):
            raise ValueError(
                f"{str(source)!r} names the image {name!r}: expected a path inside the folder of the images, without "
                "'..' and without a leading '/'"
            )
    return list(names)


def listing(folder: Path) -> set[str]:
    """Names of all entries of a folder; none where there is no such folder."""
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
