"""Capture what image decoders written in C print to stderr, and add the file name."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_STDERR = 2
_buffers: dict[int, int] = {}
"""Process → file that replaces its stderr; one per process, because forked workers must not share an offset."""


@contextmanager
def decoder_messages(name: str, kept: tuple[str, ...]) -> Iterator[list[str]]:
    """Collect the lines that decoders print inside the block, and print them after it, prefixed with the file name.

    Only in the main thread: all threads of a process share stderr.

    Args:
        name: Name of the decoded file.
        kept: Prefixes of lines not printed again, because the caller reports them.

    Yields:
        A list, filled with the lines when the block ends.
    """
    lines: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield lines
        return
    try:
        buffer = _buffer()
        saved = os.dup(_STDERR)
    except OSError:  # no stderr, or no file to replace it
        yield lines
        return
    try:
        os.dup2(buffer, _STDERR)
        yield lines
    finally:
        os.dup2(saved, _STDERR)
        os.close(saved)
        size = os.fstat(buffer).st_size
        if size:
            os.lseek(buffer, 0, os.SEEK_SET)
            lines += os.read(buffer, size).decode(errors="replace").splitlines()
            os.ftruncate(buffer, 0)
            os.lseek(buffer, 0, os.SEEK_SET)
            sys.stderr.write("".join(f"{name}: {line}\n" for line in lines if not line.startswith(kept)))


def _buffer() -> int:
    process = os.getpid()
    if process not in _buffers:
        if hasattr(os, "memfd_create"):
            _buffers[process] = os.memfd_create("decoder messages")
        else:
            with tempfile.TemporaryFile() as file:
                _buffers[process] = os.dup(file.fileno())
    return _buffers[process]
