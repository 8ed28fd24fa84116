"""A terminal of some columns that records its output."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import termios
import threading

_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A pseudo-terminal: output to `writer`, or to the descriptor `inner`, is recorded in `drawn`."""

    def __init__(self, columns: int) -> None:
        self.outer, self.inner = os.openpty()
        fcntl.ioctl(self.inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.writer = os.fdopen(os.dup(self.inner), "w", buffering=1)
        self._parts: list[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self.outer, 65536)
            except OSError:  # it is closed everywhere
                return
            if not part:
                return
            self._parts.append(part)

    def close(self) -> None:
        """Wait until all output has been read."""
        self.writer.close()
        os.close(self.inner)
        self._reader.join(timeout=10)
        os.close(self.outer)

    @property
    def drawn(self) -> list[str]:
        """Every state of every line: a carriage return starts another."""
        text = _COLOURS.sub("", b"".join(self._parts).decode())
        return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]
