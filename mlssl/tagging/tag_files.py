"""Files of tags, written row by row: path, labels, and one probability per class, as CSV, JSON Lines or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mlssl.atomic import written_aside
from mlssl.embeddings.files import utf8

SUFFIXES = (".csv", ".jsonl", ".parquet")
SEPARATOR = "|"
"""Separator of an image's labels in a CSV file."""


class TagWriter(Protocol):
    """Writes the tags of images."""

    def write(self, names: Sequence[str], labels: Sequence[Sequence[str]], probabilities: list[list[float]]) -> None:
        """Write one row per image: its name, its labels, and the L probabilities of all classes."""
        ...


def check_tag_file(path: Path, classes: Sequence[str]) -> None:
    """Refuse an output that cannot be written, before any image is read.

    Raises:
        ValueError: If its suffix is not a known format, or classes would be ambiguous in a CSV file.
        ImportError: If the output is Parquet and pyarrow is missing.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} has no known format: use a suffix of {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ImportError("Parquet needs pyarrow: pip install pyarrow, or write .csv or .jsonl")
    joined = [name for name in classes if SEPARATOR in name]
    if path.suffix == ".csv" and joined:
        raise ValueError(f"the class {joined[0]!r} contains the separator of a CSV file, {SEPARATOR!r}: write .jsonl")


@contextmanager
def tag_writer(path: Path, classes: Sequence[str]) -> Iterator[TagWriter]:
    """A writer of the format of the suffix; the file gets its name when it is complete.

    Raises:
        ValueError: As `check_tag_file`.
        OSError: If the file cannot be written.
    """
    check_tag_file(path, classes)
    with written_aside(path) as aside:
        if path.suffix == ".parquet":
            yield from _parquet(aside, classes)
        else:
            with aside.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                yield _Csv(file, classes) if path.suffix == ".csv" else _JsonLines(file, classes)


class _Csv:
    def __init__(self, file: Any, classes: Sequence[str]) -> None:
        self.rows = csv.writer(file)
        self.rows.writerow(["path", "labels", *classes])

    def write(self, names: Sequence[str], labels: Sequence[Sequence[str]], probabilities: list[list[float]]) -> None:
        for name, given, row in zip(names, labels, probabilities, strict=True):
            self.rows.writerow([name, SEPARATOR.join(given), *(f"{value:.6g}" for value in row)])


class _JsonLines:
    def __init__(self, file: Any, classes: Sequence[str]) -> None:
        self.file, self.classes = file, classes

    def write(self, names: Sequence[str], labels: Sequence[Sequence[str]], probabilities: list[list[float]]) -> None:
        for name, given, row in zip(names, labels, probabilities, strict=True):
            values = {key: float(f"{value:.6g}") for key, value in zip(self.classes, row, strict=True)}
            self.file.write(json.dumps({"path": name, "labels": list(given), "probabilities": values}) + "\n")


def _parquet(path: Path, classes: Sequence[str]) -> Iterator[TagWriter]:
    import pyarrow
    from pyarrow import parquet

    fields = [("path", pyarrow.string()), ("labels", pyarrow.list_(pyarrow.string()))]
    schema = pyarrow.schema([*fields, *((f"probability: {name}", pyarrow.float32()) for name in classes)])

    class Parquet:
        def write(
            self, names: Sequence[str], labels: Sequence[Sequence[str]], probabilities: list[list[float]]
        ) -> None:
            columns = [
                list(map(utf8, names)),
                [list(given) for given in labels],
                *map(list, zip(*probabilities, strict=True)),
            ]
            writer.write_table(pyarrow.table(columns, schema=schema))

    with parquet.ParquetWriter(path, schema) as writer:
        yield Parquet()
