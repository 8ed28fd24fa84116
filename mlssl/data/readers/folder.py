"""A folder of unlabelled images, searched recursively."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection
from pathlib import Path

from mlssl.data.decoding import decode_rgb, readable_extensions
from mlssl.data.paths import count_extensions
from mlssl.data.records import Decode, Records


def read_folder(
    root: str | os.PathLike[str],
    extensions: Collection[str] | None = None,
    *,
    decode: Decode = decode_rgb,
    channels: int = 3,
) -> Records:
    """Find all images below a folder by their extensions.

    Args:
        root: The folder. Hidden files and folders (leading dot) are skipped; links to folders are followed, but no
            folder is visited twice.
        extensions: Extensions to find, in any case, with or without the dot. None: `readable_extensions()`.
        decode: From a path to pixels uint8 (H, W, C), as for `Records`.
        channels: C that `decode` gives.

    Returns:
        Unlabelled records in the order of their paths; ids 0 … n − 1 in that order.

    Raises:
        FileNotFoundError: The folder does not exist or contains no such image.
        NotADirectoryError: `root` is a file.
        TypeError: `extensions` is one string.
    """
    if isinstance(extensions, str):
        raise TypeError(f"extensions={extensions!r} is one string: pass a list, ({extensions!r},)")
    folder = Path(root)
    if folder.is_file():
        raise NotADirectoryError(f"{str(folder)!r} is a file: pass the folder of the images")
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}: pass a folder of images")
    wanted = tuple("." + extension.lower().lstrip(".") for extension in extensions or readable_extensions())
    files = _files_below(folder)
    images = sorted(file for file in files if file.lower().endswith(wanted))
    if not images:
        raise FileNotFoundError(
            f"no image below {str(folder)!r}, which contains {len(files)} other files: the extensions are "
            f"{', '.join(wanted)}; pass another folder or other extensions"
        )
    left_out = count_extensions(set(files) - set(images))
    return Records(images, root=folder, decode=decode, channels=channels, left_out=left_out)


def _files_below(folder: Path) -> list[str]:
    """Paths of all files relative to the folder, with '/' as separator."""
    files = []
    to_visit = deque([""])
    visited = set()
    while to_visit:
        below = to_visit.popleft()
        real = os.path.realpath(folder / below)
        if real in visited:
            continue
        visited.add(real)
        with os.scandir(folder / below) as entries:
            inside = sorted(
                (entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name
            )
        files += [below + entry.name for entry in inside if entry.is_file()]
        below_it = [(entry, f"{below}{entry.name}/") for entry in inside if entry.is_dir()]
        # Links come last, so that a folder that is also linked keeps its own name.
        to_visit.extendleft(path for entry, path in below_it if not entry.is_symlink())
        to_visit.extend(path for entry, path in below_it if entry.is_symlink())
    return files
