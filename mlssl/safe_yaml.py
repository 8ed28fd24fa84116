"""The only YAML reader: plain values, with bounded depth and bounded size after alias expansion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_DEPTH = 100
"""Maximum nesting of lists and mappings."""

MAX_SIZE = 10_000_000
"""Maximum number of entries and characters, with alias repetitions."""

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: Path) -> Any:
    """Read plain values from a file.

    Raises:
        ValueError: It is not text, not YAML, nested too deeply or too large; names the file, and the line if known.
        OSError: It cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """Parse plain values from a text.

    Args:
        text: YAML, which includes JSON.
        source: Its origin, for errors.

    Raises:
        ValueError: As `read_yaml`.
    """
    try:
        _check_size(text)
        return yaml.load(text, Loader=_LOADER)
    except _TooLargeError as error:
        raise ValueError(f"{source}, {error}") from None
    except Exception as error:  # the loader raises almost anything for values such as !!bool x
        reason = " ".join(str(error).split())
        kind = "" if isinstance(error, yaml.YAMLError) else f"{type(error).__name__} "
        raise ValueError(f"{source} cannot be read as YAML: {kind}{reason}") from None


def check_yaml_size(text: str, source: str) -> None:
    """Refuse a text that would expand too much in another reader; that reader handles invalid YAML.

    Args:
        text: YAML.
        source: Its origin, for errors.

    Raises:
        ValueError: It is nested too deeply or too large; names the line.
    """
    try:
        _check_size(text)
    except _TooLargeError as error:
        raise ValueError(f"{source}, {error}") from None
    except yaml.YAMLError:
        return


class _TooLargeError(Exception):
    """The text exceeds a limit; the message names the line."""


def _check_size(text: str) -> None:
    """Count the expanded size of a text from its events, without building values."""
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and the size before it
    size = 0
    for event in yaml.parse(text, Loader=_LOADER):
        anchor = getattr(event, "anchor", None)
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            if anchor not in sizes:  # the loader reports undefined ones
                if any(anchor == one for one, _ in open_nodes):
                    raise _TooLargeError(f"line {line}: {anchor!r} contains itself: write the values out.")
                continue
            size += sizes[anchor]
        elif isinstance(event, yaml.ScalarEvent):
            size += 1 + len(event.value)
            if anchor is not None:
                sizes[anchor] = 1 + len(event.value)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((anchor, size))
            size += 1
            if len(open_nodes) > MAX_DEPTH:
                raise _TooLargeError(f"line {line}: nested more than {MAX_DEPTH} deep: write it flatter.")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = size - before
        if size > MAX_SIZE:
            raise _TooLargeError(
                f"line {line}: more than {MAX_SIZE:,} entries and characters after alias expansion: "
                "write a smaller file, with fewer aliases."
            )
