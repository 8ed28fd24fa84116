"""How long the library waits for a server that says nothing, and what it says then."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

TIMEOUT = 60.0
"""Seconds for a server to answer."""

LONGEST_READ = 600.0
"""Seconds for a whole file, as the loader waits for a batch."""

T = TypeVar("T")


def answer(function: Callable[..., T], *arguments: Any, seconds: float | None = None, **named: Any) -> T:
    """What a function gives that asks a server, whatever library it asks by.

    It runs in a thread, which is left behind where it does not end.

    Args:
        function: To be called.
        *arguments: Of the function.
        seconds: To wait, `TIMEOUT` by default.
        **named: Further arguments of the function.

    Raises:
        TimeoutError: If it takes longer.
    """
    seconds = TIMEOUT if seconds is None else seconds
    ended: list[tuple[bool, Any]] = []

    def call() -> None:
        try:
            ended.append((True, function(*arguments, **named)))
        except BaseException as error:  # which is raised where the answer is waited for
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
    """Have downloads end whose server sends nothing for `TIMEOUT`, where the library that asks sets no time itself."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT if before is None else before)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
