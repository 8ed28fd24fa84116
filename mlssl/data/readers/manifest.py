"""A manifest: one file that lists images and what they show.

A CSV or JSON Lines file is read::

    photos/train.csv                          photos/train.jsonl
        path,labels,unknown                       {"path": "a/1.jpg", "labels": ["sky", "sea"]}
        a/1.jpg,sky|sea,                          {"path": "b/2.jpg", "labels": [], "unknown": ["sky"]}
        b/2.jpg,,sky
    photos/a/1.jpg
    photos/b/2.jpg
"""

from __future__ import annotations

import csv
import difflib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlssl.data.decoding import decode_rgb
from mlssl.data.paths import check_files, check_names
from mlssl.data.records import Decode, Records

FIELDS = ("path", "labels", "unknown")
SEPARATOR = "|"
"""Between the names in a field of a CSV file."""


def read_manifest(
    path: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
    *,
    root: str | os.PathLike[str] | None = None,
    decode: Decode = decode_rgb,
    channels: int = 3,
) -> Records:
    """Read a list of images and their labels: CSV with a header, or one JSON object a line.

    A line has `path`, `labels` and, if wanted, `unknown`: names of the classes that the image shows, and of those
    that nobody looked for. All others are absent. Without `labels` in the whole file the images are unlabelled. In CSV,
    names are separated by "|".

    Args:
        path: The file; .jsonl and .ndjson are JSON Lines, anything else is CSV (UTF-8).
        classes: The L names, in the order of the labels; then any other name is an error. None: all names in the file,
            in alphabetical order.
        root: Folder that paths in the file start from; that of the file by default. Paths stay inside it.
        decode: From a path to pixels uint8 (H, W, C), as for `Records`.
        channels: C that `decode` gives.

    Returns:
        Images in the order of the file; ids 0 … n − 1.

    Raises:
        FileNotFoundError: The file or an image that it lists is missing.
        ValueError: The file has no line, another column, no path, a path twice, one that leads out of the folder, a
            name that is no class, or a name that is both present and unknown.
    """
    manifest = Path(path)
    if not manifest.is_file():
        raise FileNotFoundError(f"no manifest {str(manifest)!r}: pass a .csv or .jsonl file that lists images")
    is_json = manifest.suffix.lower() in (".jsonl", ".ndjson")
    lines = list((_json_lines if is_json else _csv_lines)(manifest))
    if not lines:
        raise ValueError(f"{str(manifest)!r} lists no image: write one line for each, with its path and labels")
    names = check_names([line["path"] for _, line in lines], manifest)
    _check_once(names, [number for number, _ in lines], manifest)
    folder = manifest.parent if root is None else Path(root)
    check_files(folder, names, manifest)
    settings: dict[str, Any] = {"root": folder, "decode": decode, "channels": channels}
    with_labels = [number for number, line in lines if line["labels"] is not None]
    if not with_labels:
        return Records(names, **settings)
    if len(with_labels) < len(lines):
        number = next(number for number, line in lines if line["labels"] is None)
        raise ValueError(
            f"line {number} of {str(manifest)!r} has no labels and others have some: write an empty list for an image "
            "that shows no class"
        )
    listed = {name for _, line in lines for field in ("labels", "unknown") for name in line[field] or ()}
    known = tuple(sorted(listed)) if classes is None else tuple(classes)
    if not known:
        raise ValueError(f"{str(manifest)!r} has labels, and no image has one: write some, or leave them out")
    column_of = {name: column for column, name in enumerate(known)}
    labels = np.zeros((len(lines), len(known)), dtype=np.int8)
    for row, (number, line) in enumerate(lines):
        for field, value in (("unknown", -1), ("labels", 1)):
            for name in line[field] or ():
                labels[row, _column(name, column_of, number, manifest)] = value
        both = set(line["labels"]) & set(line["unknown"] or ())
        if both:
            raise ValueError(
                f"line {number} of {str(manifest)!r} has {sorted(both)[0]!r} as a label and as unknown: keep one"
            )
    return Records(names, labels, known, **settings)


def _csv_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            reader = csv.DictReader(file, strict=True)
            header = [name.strip() for name in reader.fieldnames or ()]
            _check_fields(header, f"the header of {str(path)!r}")
            reader.fieldnames = header
            for line in reader:
                where = f"line {reader.line_num} of {str(path)!r}"
                if None in line or None in line.values():
                    raise ValueError(f"{where} does not have {len(header)} fields as its header: quote commas in names")
                yield (
                    reader.line_num,
                    {
                        "path": line["path"].strip(),
                        "labels": _split(line.get("labels")),
                        "unknown": _split(line.get("unknown")),
                    },
                )
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{str(path)!r} is not CSV in UTF-8 ({error}): save it as such") from error


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        if not text.strip():
            continue
        where = f"line {number} of {str(path)!r}"
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON ({error}): write one object a line") from error
        if not isinstance(entry, dict):
            raise ValueError(f'{where} is a {type(entry).__name__}: write an object, {{"path": …, "labels": […]}}')
        _check_fields(entry, where)
        for field in ("labels", "unknown"):
            names = entry.get(field)
            if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
                raise ValueError(f"{where} has {field} {names!r}: write a list of names")
        yield number, {field: entry.get(field) for field in FIELDS}


def _split(names: str | None) -> list[str] | None:
    if names is None:
        return None
    return [name.strip() for name in names.split(SEPARATOR) if name.strip()]


def _check_fields(given: Iterable[str], where: str) -> None:
    fields = list(given)
    for field in fields:
        if field not in FIELDS:
            near = difflib.get_close_matches(str(field), FIELDS, n=1)
            raise ValueError(
                f"{where} has the column {field!r}{f' (did you mean {near[0]!r}?)' if near else ''}: "
                "expected path, labels and unknown, and nothing else"
            )
    if "path" not in fields:
        raise ValueError(f"{where} has no path: expected path, labels and unknown")


def _check_once(names: list[str], numbers: list[int], path: Path) -> None:
    seen: dict[str, int] = {}
    for name, number in zip(names, numbers, strict=True):
        if name in seen:
            raise ValueError(
                f"line {number} of {str(path)!r} lists {name!r} as line {seen[name]} does: keep one of them"
            )
        seen[name] = number


def _column(name: str, column_of: dict[str, int], number: int, path: Path) -> int:
    if name not in column_of:
        near = difflib.get_close_matches(name, column_of, n=1, cutoff=0.75)
        raise ValueError(
            f"line {number} of {str(path)!r} has the label {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}, "
            f"which is none of the {len(column_of)} classes: correct it, or add it to the classes"
        )
    return column_of[name]
