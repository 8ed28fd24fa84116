"""The one reader of YAML: plain values, of a bounded depth and a bounded size once aliases are followed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_DEPTH = 100
"""Of lists and mappings in each other."""

MAX_SIZE = 10_000_000
"""Entries and characters, each counted as often as aliases repeat it."""

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: Path) -> Any:
    """Plain values of a file.

    Raises:
        ValueError: If it is not text, not YAML, nested too deeply or too large; names the file, and the line if known.
        OSError: If it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> Any:
    """Plain values of a text.

    Args:
        text: YAML, of which JSON is a part.
        source: Where it is from, for errors.

    Raises:
        ValueError: As `read_yaml`.
    """
    try:
        _check_size(text)
        return yaml.load(text, Loader=_LOADER)
    except _TooLargeError as error:
        raise ValueError(f"{source}, {error}") from None
    except Exception as error:  # a value such as !!bool x makes the loader raise almost anything
        said = " ".join(str(error).split())
        kind = "" if isinstance(error, yaml.YAMLError) else f"{type(error).__name__} "
        raise ValueError(f"{source} cannot be read as YAML: {kind}{said}") from None


def check_yaml_size(text: str, source: str) -> None:
    """Refuse a text that another reader would build something too large of; one that is no YAML is left to it.

    Args:
        text: YAML.
        source: Where it is from, for errors.

    Raises:
        ValueError: If it is nested too deeply or too large; names the line.
    """
    try:
        _check_size(text)
    except _TooLargeError as error:
        raise ValueError(f"{source}, {error}") from None
    except yaml.YAMLError:
        return


class _TooLargeError(Exception):
    """What is more than the limits, after the line."""


def _check_size(text: str) -> None:
    """Count what the text would grow to, by its events, of which nothing is built."""
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and the size before it
    size = 0
    for event in yaml.parse(text, Loader=_LOADER):
        anchor = getattr(event, "anchor", None)
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            if anchor not in sizes:  # the loader names one that is undefined
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
                f"line {line}: more than {MAX_SIZE:,} entries and characters once its aliases are followed: "
                "write a smaller file, with fewer aliases."
            )
