"""Timeouts for servers that do not answer, and their error."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

TIMEOUT = 60.0
"""Seconds for a server to answer."""

READ_TIMEOUT = 600.0
"""Seconds for a whole file; equal to the loader's timeout for a batch."""

T = TypeVar("T")


def call_with_timeout(function: Callable[..., T], *arguments: Any, seconds: float | None = None, **named: Any) -> T:
    """Call a function that contacts a server, and raise if it takes too long.

    It runs in a thread, which is abandoned if it does not end.

    Args:
        function: Function to call.
        *arguments: Arguments of the function.
        seconds: Timeout, `TIMEOUT` by default.
        **named: Keyword arguments of the function.

    Raises:
        TimeoutError: It takes longer.
    """
    seconds = TIMEOUT if seconds is None else seconds
    ended: list[tuple[bool, Any]] = []

    def call() -> None:
        try:
            ended.append((True, function(*arguments, **named)))
        except BaseException as error:  # re-raised by the waiting thread
            ended.append((False, error))

    thread = threading.Thread(target=call, name="mlssl-answer", daemon=True)
    thread.start()
    thread.join(seconds)
    if not ended:
        raise TimeoutError(f"no answer within {seconds:g} seconds")
    done, result = ended[0]
    if not done:
        raise result
    answered: T = result
    return answered


@contextmanager
def downloads_end() -> Iterator[None]:
    """Set a default socket timeout of `TIMEOUT` for downloads by libraries that set none."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT if before is None else before)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
