"""Filter log messages and warnings for the commands, and print them above the progress bar."""

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
"""Loggers of Lightning; mlssl uses them too, by `rank_zero_info`."""

_PACKAGES = ("lightning", "lightning_utilities", "lightning_fabric", "pytorch_lightning", "jsonargparse")
"""Packages whose messages are about their internals, or give advice that the summary at the start already covers."""

_DEVELOPER_WARNINGS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
"""Warnings addressed to developers of the code that raises them."""


@contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """While entered, show messages of mlssl and warnings about the user's input, and hide other packages' remarks.

    Lines are written above a progress bar, not into it. Hidden are remarks and warnings of Lightning, deprecation
    warnings of any package, and torch's advice on loader processes; errors are never hidden.

    Args:
        verbose: Whether to show everything.
    """
    root = logging.getLogger()
    kept = {name: (logger := logging.getLogger(name), list(logger.handlers), logger.propagate) for name in _LIGHTNING}
    root_handlers, show = list(root.handlers), warnings.showwarning
    handler = _Screen(verbose)
    for logger, _, _ in kept.values():
        logger.handlers, logger.propagate = [handler], False
    if not root_handlers:  # else Lightning, once imported, would add its own handlers
        root_handler = _Screen(verbose)
        root_handler.setLevel(logging.WARNING)
        root.addHandler(root_handler)

    def show_warning(
        message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if file is not None:
            show(message, category, filename, lineno, file, line)
        elif verbose or not is_remark(category, filename):
            where = f"{filename}:{lineno}: " if verbose else ""
            tqdm.write(f"{where}warning: {message}", file=sys.stderr)

    warnings.showwarning = show_warning
    try:
        yield
    finally:
        warnings.showwarning, root.handlers = show, root_handlers
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
    if issubclass(category, _DEVELOPER_WARNINGS):
        return True
    return _is_package_file(filename) or parts[-4:-1] == ("torch", "utils", "data")


def _is_package_file(filename: str) -> bool:
    parts = Path(filename).parts
    return "site-packages" in parts and parts[len(parts) - parts[::-1].index("site-packages")] in _PACKAGES


class _Screen(logging.Handler):
    """Writes log messages to standard error unchanged, above a progress bar."""

    def __init__(self, verbose: bool) -> None:
        super().__init__(logging.NOTSET)
        self._verbose = verbose

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.ERROR and not self._verbose and _is_package_file(record.pathname):
            return
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)
