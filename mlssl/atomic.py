"""Atomic file writes: write to a temporary name, flush to disk, then rename."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlssl.locks import locked


class FullDiskError(OSError):
    """No space, no quota, or a file larger than allowed; the message gives the state of the files."""

    kept = "nothing new was kept, and an existing file is intact"
    """State of the files."""

    def __str__(self) -> str:
        return f"{super().__str__()}: {self.kept}; free some space"


class NotWritableError(PermissionError):
    """No permission, or a read-only disk."""

    def __str__(self) -> str:
        return f"{super().__str__()}: nothing was changed; choose another path, or check its permissions"


FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a `FullDiskError`."""

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Error numbers of a `NotWritableError`."""

_ASIDE = re.compile(r"\.(?:.+\.)?[0-9a-f]{8}(?:\.[^.]+)?")
"""Temporary names of `written_aside`, and of the folders of the other two."""

_EXPORT_ASIDE = ".mlssl-"
"""Prefix of the temporary names of `files_written_aside`, whose target folders also contain other files."""


@contextmanager
def written_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name in the folder of `path`, and rename it to `path` when the block succeeds.

    If the block raises, the temporary file is removed and an existing `path` stays unchanged. The temporary name starts
    with a dot and keeps the suffix, which some writers use to choose the format. A missing folder is created. A process
    killed inside the block leaves its temporary file, never a partial `path`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with written_aside(f"{folder}/numbers.txt") as aside:
    ...         _ = aside.write_text("1 2 3")
    ...     sorted(file.name for file in Path(folder).iterdir())
    ['numbers.txt']

    Args:
        path: Final path; replaced if it exists.

    Raises:
        FullDiskError: The disk is full; names `path`.
        NotWritableError: No permission; names `path`.
        OSError: The file cannot be written for another reason; names `path`.
    """
    path = Path(path)
    aside = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    with errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with errors_named(path, aside):
            yield aside
            _flush(aside)
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    _flush(path.parent)


@contextmanager
def files_written_aside(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder in `folder`, and move its files to `folder` when the block succeeds.

    If the block raises, `folder` stays unchanged, or is removed if it was created here. Other files in it are never
    touched. A process killed between two moves leaves complete files, some old and some new. A second writer waits for
    the first, and removes temporary files of killed ones.

    Args:
        folder: Target; created if missing.
        overwrite: Whether to replace files of the same names; files with equal content are always accepted.

    Raises:
        FileExistsError: A file exists and must not be replaced; then none is moved.
        FullDiskError: The disk is full.
        OSError: A file cannot be written or moved for another reason.
    """
    folder = Path(folder)
    missing = not folder.exists()
    with errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{_EXPORT_ASIDE}{secrets.token_hex(4)}"
    try:
        with locked(folder / ".export.lock", f"the folder {folder.resolve()}", wait=True) as is_alone:
            if is_alone:
                _remove(path for path in folder.iterdir() if path.name.startswith(_EXPORT_ASIDE))
            try:
                with errors_named(folder, aside):
                    aside.mkdir()
                    yield aside
                    _move(aside, folder, overwrite)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    finally:
        if missing and not any(folder.iterdir()):
            folder.rmdir()


def _move(aside: Path, folder: Path, overwrite: bool) -> None:
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


def check_free(path: str | os.PathLike[str]) -> None:
    """Raise FileExistsError if `path` exists, before any expensive work."""
    if os.path.lexists(path):
        raise FileExistsError(f"{os.fspath(path)!r} exists, and nothing in it was changed: choose another path")


@contextmanager
def folder_written_aside(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder next to `folder`, and rename it to `folder` when the block succeeds.

    If the block raises, its files are removed. A process killed inside the block leaves its temporary folder, whose
    name starts with a dot, never a partial `folder`; the next one removes it.

    Args:
        folder: Final folder; missing parents are created.

    Raises:
        FileExistsError: `folder` exists, before anything is written or at the end.
        OSError: Another process writes it.
        FullDiskError: The disk is full.
        OSError: A file cannot be written for another reason.
    """
    folder = Path(folder)
    check_free(folder)
    with errors_named(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    with locked(folder.with_name(f".{folder.name}.lock"), folder, wait=False) as is_alone:
        if is_alone:
            _remove(path for path in folder.parent.iterdir() if _is_aside_of(folder, path))
        try:
            with errors_named(folder, aside):
                aside.mkdir()
                yield aside
                for path in (aside, *aside.rglob("*")):
                    _flush(path)
                check_free(folder)
                aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    _flush(folder.parent)


def remove_leftovers(folder: str | os.PathLike[str]) -> int:
    """Remove temporary files of killed processes in `folder`, which no other process may be writing to.

    Returns:
        Their bytes.
    """
    folder = Path(folder)
    found = [path for path in folder.iterdir() if _ASIDE.fullmatch(path.name)] if folder.is_dir() else []
    return _remove(path for path in found if path.is_file() and not path.is_symlink())


def _is_aside_of(folder: Path, path: Path) -> bool:
    return path.name.startswith(f".{folder.name}.") and bool(
        re.fullmatch("[0-9a-f]{8}", path.name[len(folder.name) + 2 :])
    )


def _remove(paths: Iterable[Path]) -> int:
    """Remove files and folders; returns their size in bytes."""
    size = 0
    for path in list(paths):
        size += sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return size


@contextmanager
def errors_named(path: Path, aside: Path | None = None) -> Iterator[None]:
    """Set the file name of errors to `path` instead of none or `aside`, and convert full-disk errors.

    Raises:
        FullDiskError: The disk is full, as reported by the system, torch or safetensors.
        NotWritableError: No permission.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        error.filename = _named(error.filename, path, aside)
        if error.errno in FULL_DISK:
            raise FullDiskError(error.errno, error.strerror, error.filename) from error
        if error.errno in _NOT_WRITABLE and _is_about(Path(error.filename), path):
            raise NotWritableError(error.errno, error.strerror, error.filename) from error
        raise
    except Exception as error:
        number = re.search(r"os error (\d+)", str(error))  # safetensors raises its own type
        if number is None or int(number[1]) not in FULL_DISK:
            raise
        raise FullDiskError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _is_about(name: Path, path: Path) -> bool:
    """Whether one of the two contains or equals the other."""
    return path == name or path in name.parents or name in path.parents


def _named(given: str | bytes | None, path: Path, aside: Path | None) -> str:
    """The user-visible path of the file of an error."""
    name = os.fsdecode(given or path)
    if aside is not None and name == str(aside):
        return str(path)
    if aside is not None and aside in Path(name).parents:
        return str(path / Path(name).relative_to(aside))
    return name


def _flush(path: Path) -> None:
    if path.is_dir() and os.name != "posix":  # folders cannot be opened there, and a rename is flushed with the file
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
