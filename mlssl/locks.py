"""File locks of the operating system: one process at a time; a lock ends with its process."""

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
"""Interval between attempts to get the lock."""

_WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Error numbers of file systems without locks."""

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)

_HELD: set[int] = set()
"""Descriptors of the locks of this process."""


@contextmanager
def locked(path: str | os.PathLike[str], what: str | os.PathLike[str], *, wait: bool) -> Iterator[bool]:
    """Hold the lock file `path` while the block runs, so that no other process runs such a block.

    The lock is the operating system's (``flock``): it ends with a killed process, and forked loader workers do not keep
    it. The file contains host and process id for the message, and is removed at the end. If the folder is not writable,
    the block runs without a lock, because it cannot write there either; likewise on Windows and, with a warning, on
    file systems without locks, such as some network file systems.

    Args:
        path: Lock file, in an existing folder.
        what: Name of the protected resource for messages.
        wait: Whether to wait for the other process, with one warning, or to raise.

    Yields:
        Whether the lock is held, so that no other process runs.

    Raises:
        OSError: Another process has the lock and `wait` is False.
    """
    path = Path(path)
    descriptor = _acquired(path)
    if descriptor is None:
        message = f"{what} is in use by {_holder(path)}"
        if not wait:
            raise OSError(f"{message}: wait until it has ended, or end it, and try again")
        warnings.warn(f"{message}: waiting until it has ended", stacklevel=3)
        while (descriptor := _acquired(path)) is None:
            time.sleep(SECONDS_BETWEEN_TRIES)
    try:
        yield descriptor in _HELD
    finally:
        if descriptor in _HELD:  # not in a forked process
            _HELD.remove(descriptor)
            with suppress(OSError):
                path.unlink()
            os.close(descriptor)


def _acquired(path: Path) -> int | None:
    """Descriptor of the lock, −1 if locks are unavailable, or None while another process has it."""
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
        os.close(descriptor)  # the previous process has removed it
    _HELD.add(descriptor)
    with suppress(OSError):  # the lock also holds on a full disk
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode())
    return descriptor


def _holder(path: Path) -> str:
    try:
        held = json.loads(path.read_text())
        return f"process {int(held['process'])} on {held['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # opened but not yet written
        return "another process"


def _forget() -> None:
    """Close the locks in a forked process, whose descriptors would keep them after the parent's death."""
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forget)
