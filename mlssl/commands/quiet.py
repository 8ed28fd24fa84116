"""What the commands let through of what is logged and warned, and how that goes together with a bar."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

_LIGHTNING = ("lightning.pytorch", "lightning.fabric")
"""Loggers that Lightning's remarks go to, and by `rank_zero_info` those of mlssl."""

_REMARKS_OF = ("lightning", "lightning_utilities", "lightning_fabric", "pytorch_lightning", "jsonargparse")
"""Packages whose remarks and warnings are about their own workings, or advice that the block at the start answers."""

_ABOUT_CODE = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
"""Warnings addressed to developers of the code that raises them."""


@contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """While entered, show what mlssl says, warnings about the user's work, and nothing of the packages' own remarks.

    Lines are written above a bar, not into it. What is left out are Lightning's own remarks and warnings, deprecations
    of any package, and torch's advice on loader processes; nothing that is logged as an error.

    Args:
        verbose: Whether to leave nothing out.
    """
    root = logging.getLogger()
    kept = {name: (logger := logging.getLogger(name), list(logger.handlers), logger.propagate) for name in _LIGHTNING}
    of_root, show = list(root.handlers), warnings.showwarning
    handler = _Screen(verbose)
    for logger, _, _ in kept.values():
        logger.handlers, logger.propagate = [handler], False
    if not of_root:  # else Lightning, once imported, would add its own handlers
        others = _Screen(verbose)
        others.setLevel(logging.WARNING)
        root.addHandler(others)

    def shown(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        if file is not None:
            show(message, category, filename, lineno, file, line)
        elif verbose or not is_remark(category, filename):
            where = f"{filename}:{lineno}: " if verbose else ""
            tqdm.write(f"{where}warning: {message}", file=sys.stderr)

    warnings.showwarning = shown
    try:
        yield
    finally:
        warnings.showwarning, root.handlers = show, of_root
        for logger, handlers, propagate in kept.values():
            logger.handlers, logger.propagate = handlers, propagate


def is_remark(category: type[Warning], filename: str) -> bool:
    """Whether a warning is about a package's internals, judged by its category and the file that raises it.

    >>> is_remark(UserWarning, "/usr/lib/python3/site-packages/lightning/pytorch/trainer/trainer.py")
    True
    >>> is_remark(UserWarning, "/home/me/mlssl/data/datamodule.py")
    False
    """
    parts = Path(filename).parts
    if issubclass(category, _ABOUT_CODE):
        return True
    return _is_of_package(filename) or parts[-4:-1] == ("torch", "utils", "data")


def _is_of_package(filename: str) -> bool:
    parts = Path(filename).parts
    return "site-packages" in parts and parts[len(parts) - parts[::-1].index("site-packages")] in _REMARKS_OF


class _Screen(logging.Handler):
    """Writes what is logged to standard error as it is, above the bar if there is one."""

    def __init__(self, verbose: bool) -> None:
        super().__init__(logging.NOTSET)
        self._verbose = verbose

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.ERROR and not self._verbose and _is_of_package(record.pathname):
            return
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)
