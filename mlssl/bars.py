"""Progress bars, of few lines where no terminal shows them."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

SECONDS_OF_LINES = 60.0
"""Between two drawings where standard error is a file, as in the log of a cluster's job."""


_FORMAT = "{desc}: {percentage:.0f}% {bar} {remaining} left, {rate_fmt}"
"""Fits in 80 columns with a description of 40; tqdm's own is cut off there."""


def progress_bar(*arguments: Any, **settings: Any) -> tqdm[Any]:
    """`tqdm` with its own arguments; without a terminal it draws once a minute and at its end."""
    if settings.get("total", 0) is not None:
        settings["bar_format"] = _FORMAT
    if not sys.stderr.isatty():
        settings |= {"mininterval": SECONDS_OF_LINES, "maxinterval": SECONDS_OF_LINES}
    return tqdm(*arguments, **settings)
