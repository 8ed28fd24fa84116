"""Progress bars, with few lines if there is no terminal."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

SECONDS_OF_LINES = 60.0
"""Between two updates if standard error is a file, such as the log of a cluster job."""


_FORMAT = "{desc}: {percentage:.0f}% {bar} {remaining} left, {rate_fmt}"
"""Fits in 80 columns with a description of 40; tqdm's default would be cut off."""


def progress_bar(*arguments: Any, **settings: Any) -> tqdm[Any]:
    """`tqdm` with its own arguments; without a terminal it prints once per minute and at the end."""
    if settings.get("total", 0) is not None:
        settings["bar_format"] = _FORMAT
    if not sys.stderr.isatty():
        settings |= {"mininterval": SECONDS_OF_LINES, "maxinterval": SECONDS_OF_LINES}
    return tqdm(*arguments, **settings)
