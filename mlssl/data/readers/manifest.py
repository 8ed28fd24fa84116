"""A manifest: one file that lists images and their labels.

CSV or JSON Lines::

    photos/train.csv                          photos/train.jsonl
        path,labels,unknown                       {"path": "a/1.jpg", "labels": ["sky", "sea"]}
        a/1.jpg,sky|sea,                          {"path": "b/2.jpg", "labels": [], "unknown": ["sky"]}
        b/2.jpg,,sky
    photos/a/1.jpg
    photos/b/2.jpg

An image whose labels are null or left out, as in {"path": "c/3.jpg"}, is unlabelled.

A CSV file may also have one column per class, of 1, 0 and −1 (unknown)::

    path,sky,sea
    a/1.jpg,1,1
    b/2.jpg,-1,0
"""

from __future__ import annotations

import difflib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlssl.data.absent import absent_values
from mlssl.data.decoding import decode_rgb
from mlssl.data.named_labels import Entry, check_repeated, records_of_entries, split_names
from mlssl.data.paths import check_files, check_names
from mlssl.data.records import OTHER_CLASSES, Decode, Records
from mlssl.data.table import FIELDS, Columns, Line, chosen_columns, csv_lines, labels_of_flags


def read_manifest(
    path: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
    *,
    root: str | os.PathLike[str] | None = None,
    decode: Decode = decode_rgb,
    channels: int = 3,
    separator: str | None = None,
    path_column: str | None = None,
    label_columns: str | Sequence[str] | None = None,
    absent: int | str | Sequence[int | str] | None = None,
    leave_out_others: bool = False,
) -> Records:
    """Read a list of images and their labels: CSV with a header, or one JSON object per line.

    A line has `path`, `labels` and optionally `unknown`: names of the present and of the unknown classes. All others
    are absent. If no line has `labels`, the images are unlabelled; if only some have them, all classes of the others
    are unknown. A CSV file may have one column per class instead, and other column names.

    Args:
        path: The file; .jsonl and .ndjson are JSON Lines, all others CSV (UTF-8).
        classes: The L names, in label order; any other name is an error. None: all names in the file, in alphabetical
            order, or its columns, in column order.
        root: Folder that paths are relative to and must not leave; by default the folder of the file.
        decode: From a path to pixels uint8 (H, W, C), as for `Records`.
        channels: C that `decode` gives.
        separator: Separator of names in a CSV field; " " means any blanks. None: "|", or a Python list; names that seem
            to use another separator are an error.
        path_column: Column of the paths. None: the column whose name is in `PATH_COLUMNS`.
        label_columns: The column of names, or the columns of 1, 0 and −1, one per class; others are left out. None: a
            column in `LABEL_COLUMNS`, or all columns if they contain only 1, 0, −1 and blanks.
        absent: What else means absent in class columns: −1, "blank" or both; the rest is unknown. None: only 0; then
            blanks, or −1 without any 0, are an error. In a column of names, a blank means no class, or unlabelled with
            `absent=0`.
        leave_out_others: Whether to leave out, and count, labels of other classes than `classes`.

    Returns:
        Images in the order of the file; ids 0 … n − 1.

    Raises:
        FileNotFoundError: The file or a listed image is missing.
        ValueError: The file is empty, has an unexpected column, no path, a repeated path or one that leaves the folder,
            a name that is unknown or both present and unknown, or ambiguous labels.
    """
    manifest = Path(path)
    if not manifest.is_file():
        raise FileNotFoundError(f"no manifest {str(manifest)!r}: pass a .csv or .jsonl file that lists images")
    is_json = manifest.suffix.lower() in (".jsonl", ".ndjson")
    folder = manifest.parent if root is None else Path(root)
    settings: dict[str, Any] = {"decode": decode, "channels": channels}
    given = {"separator": separator, "path_column": path_column, "label_columns": label_columns, "absent": absent}
    if is_json:
        _check_given(given, (), "named fields", manifest)
        entries = _of_json(manifest)
    else:
        header, lines = csv_lines(manifest)
        wanted = [label_columns] if isinstance(label_columns, str) else label_columns
        columns = chosen_columns(header, lines, path_column, wanted, f"the header of {str(manifest)!r}")
        if columns.flags and lines:
            _check_given(given, ("path_column", "label_columns", "absent"), "one column per class", manifest)
            names = check_names([line[columns.path] for _, line in lines], manifest)
            check_repeated(names, [f"line {number}" for number, _ in lines], manifest)
            files = check_files(folder, names, manifest)
            labels, known, num_others = labels_of_flags(
                lines, columns.flags, classes, absent, manifest, leave_out_others=leave_out_others
            )
            left_out = Counter(files.left_out) + Counter({OTHER_CLASSES: num_others})
            return Records(files.names, labels, known, root=folder, left_out=left_out, **settings)
        what, of_names = "names of classes", ("separator", "path_column", "label_columns")
        _check_given(given, of_names if absent_values(absent)["-1"] == 0 else (*of_names, "absent"), what, manifest)
        entries = _of_names(lines, columns, separator, classes, manifest, absent)
    if not entries:
        raise ValueError(f"{str(manifest)!r} lists no image: write one line per image, with path and labels")
    return records_of_entries(entries, manifest, folder, classes, leave_out_others=leave_out_others, **settings)


def _check_given(given: Mapping[str, object], wanted: Sequence[str], what: str, path: Path) -> None:
    for name, value in given.items():
        if value is not None and name not in wanted:
            raise ValueError(f"{name}={value!r} was given, and {str(path)!r} has {what}: leave {name} out")


def _of_names(
    lines: Sequence[Line],
    columns: Columns,
    separator: str | None,
    classes: Sequence[str] | None,
    path: Path,
    absent: int | str | Sequence[int | str] | None,
) -> list[Entry]:
    """Entries of a table whose fields contain names; a blank is either no class or unlabelled."""
    fields = {"labels": columns.names, "unknown": columns.unknown}
    named = split_names(lines, {field: one for field, one in fields.items() if one}, separator, classes, path)
    blank_is_absent = absent is None or absent_values(absent)["blank"] == 0
    entries = []
    for (number, line), names in zip(lines, named, strict=True):
        labels, unknown = names.get("labels"), names.get("unknown", ())
        is_labelled = labels or unknown or blank_is_absent
        entries.append(Entry(f"line {number}", line[columns.path], labels if is_labelled else None, unknown))
    return entries


def _of_json(path: Path) -> list[Entry]:
    entries = []
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        if not text.strip():
            continue
        where = f"line {number} of {str(path)!r}"
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON ({error}): write one object per line") from error
        if not isinstance(entry, dict):
            raise ValueError(f'{where} is a {type(entry).__name__}: write an object, {{"path": …, "labels": […]}}')
        for field in entry:
            if field not in FIELDS:
                near = difflib.get_close_matches(str(field), FIELDS, n=1)
                raise ValueError(
                    f"{where} has the column {field!r}{f' (did you mean {near[0]!r}?)' if near else ''}: "
                    "expected only path, labels and unknown"
                )
        if "path" not in entry:
            raise ValueError(f"{where} has no path: expected path, labels and unknown")
        for field in ("labels", "unknown"):
            names = entry.get(field)
            if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
                raise ValueError(f"{where} has {field} {names!r}: write a list of names")
            if names is not None and not all(name.strip() for name in names):
                raise ValueError(f"{where} has an empty name among its {field}: give each class a name")
        labels, unknown = (
            None if (names := entry.get(field)) is None else [unicodedata.normalize("NFC", name) for name in names]
            for field in ("labels", "unknown")
        )
        # An image with unknown classes is labelled for the rest.
        entries.append(Entry(f"line {number}", entry["path"], [] if unknown and not labels else labels, unknown or ()))
    return entries
