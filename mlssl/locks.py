"""One process at a time: locks of the operating system, which end with the process that holds them."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

SECONDS_BETWEEN_TRIES = 0.5
"""How often a process that waits looks whether the lock is free."""

_WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Error numbers of file systems that have no locks."""

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)

_HELD: set[int] = set()
"""Descriptors of the locks of this process."""


@contextmanager
def locked(path: str | os.PathLike[str], what: str | os.PathLike[str], *, wait: bool) -> Iterator[bool]:
    """Hold the lock file `path` while the block runs, so that no other process is in such a block.

    The lock is the operating system's (``flock``): that of a process that was killed is free at once, and forked loader
    workers do not keep it. The file holds host and process id for the sentence below, and is removed at the end. Where
    the folder is not writable the block runs without a lock, because it cannot write there either; where the file
    system has no locks, as some network file systems, and on Windows, likewise, the former with a warning.

    Args:
        path: Lock file, in an existing folder.
        what: What it protects, as the user knows it.
        wait: Whether to wait for the other process, with one warning, or to raise.

    Yields:
        Whether there is a lock, and so no other process.

    Raises:
        OSError: If another process holds the lock and `wait` is False.
    """
    path = Path(path)
    descriptor = _acquired(path)
    if descriptor is None:
        said = f"{what} is in use by {_holder(path)}"
        if not wait:
            raise OSError(f"{said}: wait until it has ended, or end it, and try again")
        warnings.warn(f"{said}: waiting until it has ended", stacklevel=3)
        while (descriptor := _acquired(path)) is None:
            time.sleep(SECONDS_BETWEEN_TRIES)
    try:
        yield descriptor in _HELD
    finally:
        if descriptor in _HELD:  # a forked process does not hold it
            _HELD.remove(descriptor)
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)


def _acquired(path: Path) -> int | None:
    """Descriptor of the lock, −1 where there can be none, or None while another process has it."""
    if sys.platform == "win32":
        return -1
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if error.errno in _NOT_WRITABLE:
                return -1
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _WITHOUT_LOCKS:
                raise
            warnings.warn(
                f"{path.parent} cannot be locked ({error.strerror}): make sure that no other process writes to it",
                stacklevel=4,
            )
            return -1
        if is_there:
            break
        os.close(descriptor)  # the process before removed it meanwhile
    _HELD.add(descriptor)
    with suppress(OSError):  # on a full disk the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode())
    return descriptor


def _holder(path: Path) -> str:
    try:
        held = json.loads(path.read_text())
        return f"process {int(held['process'])} on {held['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # between its opening and its writing
        return "another process"


def _forget() -> None:
    """In a forked process, whose open descriptors would keep the locks of its parent after the parent's death."""
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forget)
