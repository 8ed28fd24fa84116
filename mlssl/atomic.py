"""Files that are whole or not there: written aside, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FullDiskError(OSError):
    """No space, no quota, or a file larger than allowed; says what became of the files."""

    def __str__(self) -> str:
        return f"{super().__str__()}: nothing new was kept, and a file that stood there is whole; free some space"


FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a `FullDiskError`."""


@contextmanager
def written_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give another name in the folder of `path` to write to, and rename it to `path` once the block has ended well.

    Where the block raises, the file aside is removed and a file that stood at `path` stays as it was. The name aside
    starts with a dot and keeps the suffix, by which some readers choose their format. The folder is made if missing.
    A process killed inside the block leaves its file aside behind, never a part of `path`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with written_aside(f"{folder}/numbers.txt") as aside:
    ...         _ = aside.write_text("1 2 3")
    ...     sorted(file.name for file in Path(folder).iterdir())
    ['numbers.txt']

    Args:
        path: Where the whole file shall stand; replaced if it exists.

    Raises:
        FullDiskError: If there is no space for the file.
        OSError: If it cannot be written otherwise (no permission), naming `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        with _errors_named(path, aside):
            yield aside
            _flush(aside)
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    _flush(path.parent)


@contextmanager
def files_written_aside(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Give a new folder in `folder` to write files to, and move them to `folder` once the block has ended well.

    Where the block raises, `folder` stays as it was, and is taken away again if it was made for this. Other files in it
    are never touched. A process killed between two moves leaves whole files, some old and some new.

    Args:
        folder: Made if missing.
        overwrite: Whether files of the same names may be replaced; files of the same content always may.

    Raises:
        FileExistsError: If one exists and may not be replaced; then none is moved.
        FullDiskError: If there is no space for the files.
        OSError: If a file cannot be written or moved otherwise.
    """
    folder = Path(folder)
    missing = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{secrets.token_hex(4)}"
    aside.mkdir()
    try:
        with _errors_named(folder, aside):
            yield aside
            files = sorted(aside.iterdir())
            for file in files:
                there = folder / file.name
                if there.exists() and not overwrite and there.read_bytes() != file.read_bytes():
                    raise FileExistsError(
                        f"{there} exists: choose another folder or name, or pass overwrite=True (--overwrite true) to "
                        "replace it."
                    )
                _flush(file)
            for file in files:
                file.replace(folder / file.name)
            _flush(folder)
    finally:
        shutil.rmtree(aside)
        if missing and not any(folder.iterdir()):
            folder.rmdir()


def check_free(path: str | os.PathLike[str]) -> None:
    """Raise FileExistsError if `path` exists, before any expensive work."""
    if os.path.lexists(path):
        raise FileExistsError(f"{os.fspath(path)!r} exists, and nothing in it was changed: choose another place")


@contextmanager
def folder_written_aside(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a new folder beside `folder` to write to, however deep, and rename it once the block has ended well.

    Where the block raises, what was written is removed. A process killed inside the block leaves its folder aside
    behind, whose name starts with a dot, never a part of `folder`.

    Args:
        folder: Where the whole folder shall stand; folders above it are made if missing.

    Raises:
        FileExistsError: If there is something at `folder`, before anything is written, or at the end.
        FullDiskError: If there is no space for the files.
        OSError: If a file cannot be written otherwise.
    """
    folder = Path(folder)
    check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    aside.mkdir()
    try:
        with _errors_named(folder, aside):
            yield aside
            for path in (aside, *aside.rglob("*")):
                _flush(path)
            check_free(folder)
            aside.rename(folder)
    finally:
        if aside.exists():
            shutil.rmtree(aside)
    _flush(folder.parent)


@contextmanager
def _errors_named(path: Path, aside: Path) -> Iterator[None]:
    """Give errors the name `path` where they have none or that of `aside`, and that of a full disk its own type."""
    try:
        yield
    except OSError as error:
        if error.filename in (None, str(aside)) and error.errno is not None:
            error.filename = str(path)
        if error.errno in FULL_DISK:
            raise FullDiskError(error.errno, error.strerror, error.filename) from error
        raise


def _flush(path: Path) -> None:
    if path.is_dir() and os.name != "posix":  # where a folder cannot be opened, and a rename is flushed with the file
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
