"""A terminal of some columns that remembers what was drawn on it."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import termios
import threading

_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A pseudo-terminal: what is written to `writer`, or to the descriptor `inner`, can be looked at in `drawn`."""

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
            except OSError:  # nobody has it open any more
                return
            if not part:
                return
            self._parts.append(part)

    def close(self) -> None:
        """Wait until all that was written has been read."""
        self.writer.close()
        os.close(self.inner)
        self._reader.join(timeout=10)
        os.close(self.outer)

    @property
    def drawn(self) -> list[str]:
        """Every line as it stood at some time: a carriage return begins another."""
        text = _COLOURS.sub("", b"".join(self._parts).decode())
        return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]
