"""A manifest: one file that lists images and what they show.

A CSV or JSON Lines file is read::

    photos/train.csv                          photos/train.jsonl
        path,labels,unknown                       {"path": "a/1.jpg", "labels": ["sky", "sea"]}
        a/1.jpg,sky|sea,                          {"path": "b/2.jpg", "labels": [], "unknown": ["sky"]}
        b/2.jpg,,sky
    photos/a/1.jpg
    photos/b/2.jpg

A CSV file may also have a column for each class, of 1, 0 and −1 (unknown)::

    path,sky,sea
    a/1.jpg,1,1
    b/2.jpg,-1,0
"""

from __future__ import annotations

import csv
import difflib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mlssl.data.absent import absent_values
from mlssl.data.decoding import decode_rgb
from mlssl.data.paths import check_files, check_names, first_repeated
from mlssl.data.records import Decode, Records, check_class_names

FIELDS = ("path", "labels", "unknown")
SEPARATOR = "|"
"""Between the names in a field of a CSV file, unless another one is given."""

PATH_COLUMNS = ("path", "image", "file", "filename", "filepath", "imagepath", "imagename", "imagefile", "imageindex")
"""Headers that are taken for the column of paths, whatever their case, blanks, dashes and underscores."""

LABEL_COLUMNS = ("labels", "label", "tags", "classes", "categories", "findinglabels")
"""Likewise, for the column of class names."""

_Line = tuple[int, dict[str, Any]]

_FLAGS = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0, "-1": -1, "-1.0": -1, "": None}
_IN_LIST = re.compile(r"""\s*(?:'([^']*)'|"([^"]*)"|([^,'"\[\]]+))\s*(?:,|(?=['"])|$)""")


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
) -> Records:
    """Read a list of images and their labels: CSV with a header, or one JSON object a line.

    A line has `path`, `labels` and, if wanted, `unknown`: names of the classes that the image shows, and of those
    that nobody looked for. All others are absent. Without `labels` in the whole file the images are unlabelled. A CSV
    file may have a column for each class instead, and its columns may have other names.

    Args:
        path: The file; .jsonl and .ndjson are JSON Lines, anything else is CSV (UTF-8).
        classes: The L names, in the order of the labels; then any other name is an error. None: all names in the file,
            in alphabetical order, or its columns, in theirs.
        root: Folder that paths in the file start from; that of the file by default. Paths stay inside it.
        decode: From a path to pixels uint8 (H, W, C), as for `Records`.
        channels: C that `decode` gives.
        separator: Between the names in a CSV field; " " stands for any blanks. None: "|", or a list as Python writes
            it; names that seem to be separated by something else are an error.
        path_column: Column of the paths. None: the one column whose name is in `PATH_COLUMNS`.
        label_columns: The column of names, or the columns of 1, 0 and −1 that each stand for a class; others are left
            out. None: a column of names in `LABEL_COLUMNS`, or all columns if each holds only 1, 0, −1 and blanks.
        absent: What else than 0 means absent in columns of classes, −1, "blank" or both; anything else is unknown.
            None: nothing; then blanks, or −1 where there is no 0, are an error.

    Returns:
        Images in the order of the file; ids 0 … n − 1.

    Raises:
        FileNotFoundError: The file or an image that it lists is missing.
        ValueError: The file has no line, another column, no path, a path twice, one that leads out of the folder, a
            name that is no class, a name that is both present and unknown, or labels that can be read in two ways.
    """
    manifest = Path(path)
    if not manifest.is_file():
        raise FileNotFoundError(f"no manifest {str(manifest)!r}: pass a .csv or .jsonl file that lists images")
    is_json = manifest.suffix.lower() in (".jsonl", ".ndjson")
    given = [label_columns] if isinstance(label_columns, str) else label_columns
    if is_json:
        lines, columns = _json_lines(manifest), _Columns(*FIELDS)
    else:
        header, lines = _csv_lines(manifest)
        columns = _chosen_columns(header, lines, path_column, given, f"the header of {str(manifest)!r}")
    for name, value, of_csv in (
        ("separator", separator, not columns.flags),
        ("path_column", path_column, True),
        ("label_columns", label_columns, True),
        ("absent", absent, bool(columns.flags)),
    ):
        if value is not None and (is_json or not of_csv):
            raise ValueError(
                f"{name}={value!r} was given, and {str(manifest)!r} has "
                f"{'named fields' if is_json else 'a column for each class' if columns.flags else 'names of classes'}: "
                f"leave {name} out"
            )
    if not lines:
        raise ValueError(f"{str(manifest)!r} lists no image: write one line for each, with its path and labels")
    names = check_names([line[columns.path] for _, line in lines], manifest)
    repeated = first_repeated(names)
    if repeated:
        first, again = (lines[place][0] for place in repeated)
        raise ValueError(
            f"line {again} of {str(manifest)!r} lists {names[repeated[1]]!r} as line {first} does: keep one of them"
        )
    folder = manifest.parent if root is None else Path(root)
    files = check_files(folder, names, manifest)
    settings: dict[str, Any] = {
        "root": folder,
        "decode": decode,
        "channels": channels,
        "left_out": files.left_out,
    }
    if columns.flags:
        labels, known = _labels_of_flags(lines, columns.flags, classes, absent, manifest)
        return Records(files.names, labels, known, **settings)
    if not is_json:
        lines = _with_names(lines, columns, separator, classes, manifest)
    if all(line["labels"] is None for _, line in lines):
        return Records(files.names, **settings)
    labels, known = _labels_of_names(lines, classes, manifest)
    return Records(files.names, labels, known, **settings)


class _Columns(NamedTuple):
    """Which column holds what: names of classes, or one class each."""

    path: str
    names: str | None = None
    unknown: str | None = None
    flags: tuple[str, ...] = ()


def _chosen_columns(
    header: list[str], lines: list[_Line], path_column: str | None, label_columns: Sequence[str] | None, where: str
) -> _Columns:
    for column in [*([path_column] if path_column else []), *(label_columns or ())]:
        if column not in header:
            near = difflib.get_close_matches(column, header, n=1)
            raise ValueError(
                f"{where} has no column {column!r}{f' (did you mean {near[0]!r}?)' if near else ''}: "
                f"it has {', '.join(header) or 'none'}"
            )
    path = path_column or _by_name(header, PATH_COLUMNS, "path_column", where)
    if label_columns is not None:
        is_name = len(label_columns) == 1 and not _is_flags(label_columns[0], lines)
        if is_name:
            return _Columns(path or "path", label_columns[0], "unknown" if "unknown" in header else None)
        chosen = _Columns(path or "path", flags=tuple(label_columns))
        _check_header(header, {*header}, path, where)
        return chosen
    names = _by_name(header, LABEL_COLUMNS, "label_columns", where)
    unknown = "unknown" if "unknown" in header else None
    others = [column for column in header if column not in (path, names, unknown)]
    if path and others and names is None and unknown is None and all(_is_flags(one, lines) for one in others):
        return _Columns(path, flags=tuple(others))
    _check_header(header, {path, names, unknown}, path, where)
    return _Columns(path or "path", names, unknown)


def _by_name(header: Iterable[str], known: tuple[str, ...], option: str, where: str) -> str | None:
    """The column whose name is the first of `known`, or the only one whose name is like one of them."""
    there = [column for column in header if re.sub(r"[\s_-]", "", column).lower() in known]
    if known[0] in there or len(there) == 1:
        return known[0] if known[0] in there else there[0]
    if there:
        raise ValueError(f"{where} has the columns {', '.join(there)}: say which one to read, {option}={there[0]!r}")
    return None


def _check_header(header: Sequence[str], expected: set[str | None], path: str | None, where: str) -> None:
    if path is None:
        raise ValueError(
            f"{where} has no path: expected path, labels and unknown, or pass path_column (--data.path_column), the "
            "column of the images' paths"
        )
    for column in header:
        if column not in expected:
            near = difflib.get_close_matches(column, FIELDS, n=1)
            raise ValueError(
                f"{where} has the column {column!r}{f' (did you mean {near[0]!r}?)' if near else ''}: "
                "expected path, labels and unknown, and nothing else, or pass the columns of the labels, such as "
                f"label_columns=['labels'] (--data.label_columns), to leave out the others"
            )


def _is_flags(column: str, lines: list[_Line]) -> bool:
    values = {line[column].strip().lower() for _, line in lines}
    return values <= _FLAGS.keys() and values != {""}


def _labels_of_flags(
    lines: list[_Line],
    columns: tuple[str, ...],
    classes: Sequence[str] | None,
    absent: int | str | Sequence[int | str] | None,
    path: Path,
) -> tuple[npt.NDArray[np.int8], tuple[str, ...]]:
    known = tuple(unicodedata.normalize("NFC", column) for column in columns)
    if classes is not None and set(classes) != set(known):
        differing = sorted(set(classes) ^ set(known))
        raise ValueError(
            f"{str(path)!r} has {len(known)} columns of classes for {len(classes)} classes (only in one of them: "
            f"{', '.join(differing[:5])}): give all lists the same columns, or name them by label_columns"
        )
    check_class_names(known, path)
    by_value = absent_values(absent)
    values = np.zeros((len(lines), len(columns)), dtype=np.int8)
    blank = None
    for row, (number, line) in enumerate(lines):
        for place, column in enumerate(columns):
            text = line[column].strip().lower()
            if text not in _FLAGS:
                raise ValueError(
                    f"line {number} of {str(path)!r} has {line[column]!r} in the column {column!r}: "
                    "expected 1, 0 or -1, or leave the column out of label_columns"
                )
            flag = _FLAGS[text]
            if flag is None:
                blank = blank or (number, column)
                values[row, place] = by_value["blank"]
            else:
                values[row, place] = by_value["-1"] if flag == -1 else flag
    if blank and absent is None:
        raise ValueError(
            f"line {blank[0]} of {str(path)!r} is blank in the column {blank[1]!r}, and nothing says whether that "
            "means absent or unknown: pass absent='blank' (--data.absent blank) for absent, or absent=0 (--data.absent "
            "0) for unknown"
        )
    order = [known.index(name) for name in classes or known]
    return values[:, order], tuple(classes or known)


def _with_names(
    lines: list[_Line], columns: _Columns, separator: str | None, classes: Sequence[str] | None, path: Path
) -> list[_Line]:
    """The lines with lists of names in place of the text of their fields."""
    fields = {"labels": columns.names, "unknown": columns.unknown}
    texts = [(number, line[column]) for number, line in lines for column in fields.values() if column]
    written = [(number, text) for number, text in texts if text.strip()]
    are_lists = bool(written) and all(text.strip()[0] == "[" and text.strip()[-1] == "]" for _, text in written)
    if separator is None and not are_lists:
        separator = SEPARATOR
        if classes is None and not any(SEPARATOR in text for _, text in written):
            _check_separator(written, path)

    def split(number: int, text: str) -> list[str]:
        if separator is None:
            names = _of_list(text.strip(), number, path)
        else:
            names = text.split(None if separator.isspace() else separator)
        return [unicodedata.normalize("NFC", name.strip()) for name in names if name.strip()]

    return [
        (
            number,
            {field: split(number, line[column]) if column else None for field, column in fields.items()},
        )
        for number, line in lines
    ]


def _check_separator(written: list[tuple[int, str]], path: Path) -> None:
    """Refuse names that look like several, joined by something else than the usual separator."""
    whole = {text.strip() for _, text in written}
    parts = {part for text in whole for part in text.split()}
    for number, text in written:
        found = next((sign for sign in (";", ",") if sign in text), None)
        if found is None and len(text.split()) > 1 and len(parts) < len(whole):
            found = " "
        if found:
            raise ValueError(
                f"line {number} of {str(path)!r} has the label {text.strip()!r}: pass separator={found!r} "
                f'(--data.separator "{found}") if these are several classes, or separator={SEPARATOR!r} '
                f'(--data.separator "{SEPARATOR}") if it is the name of one'
            )


def _of_list(text: str, number: int, path: Path) -> list[str]:
    names, place, inside = [], 0, text[1:-1].strip()
    while place < len(inside):
        match = _IN_LIST.match(inside, place)
        if not match:
            raise ValueError(
                f"line {number} of {str(path)!r} has the labels {text!r}: write a list as ['sky', 'sea'], or sky|sea"
            )
        names.append(next(group for group in match.groups() if group is not None))
        place = match.end()
    return names


def _labels_of_names(
    lines: list[_Line], classes: Sequence[str] | None, manifest: Path
) -> tuple[npt.NDArray[np.int8], tuple[str, ...]]:
    without = next((number for number, line in lines if line["labels"] is None), None)
    if without is not None:
        raise ValueError(
            f"line {without} of {str(manifest)!r} has no labels and others have some: write an empty list for an image "
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
    return labels, known


def _csv_lines(path: Path) -> tuple[list[str], list[_Line]]:
    lines: list[_Line] = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, ())]
            twice = next((column for column in header if header.count(column) > 1), None)
            if twice is not None:
                raise ValueError(
                    f"the header of {str(path)!r} has the column {twice!r} twice: give each column a name of its own"
                )
            for values in reader:
                if not values:
                    continue
                if len(values) != len(header):
                    raise ValueError(
                        f"line {reader.line_num} of {str(path)!r} does not have {len(header)} fields as its header: "
                        "quote commas in names"
                    )
                line = dict(zip(header, values, strict=True))
                lines.append((reader.line_num, line))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{str(path)!r} is not CSV in UTF-8 ({error}): save it as such") from error
    return header, lines


def _json_lines(path: Path) -> list[_Line]:
    lines: list[_Line] = []
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
        for field in entry:
            if field not in FIELDS:
                near = difflib.get_close_matches(str(field), FIELDS, n=1)
                raise ValueError(
                    f"{where} has the column {field!r}{f' (did you mean {near[0]!r}?)' if near else ''}: "
                    "expected path, labels and unknown, and nothing else"
                )
        if "path" not in entry:
            raise ValueError(f"{where} has no path: expected path, labels and unknown")
        for field in ("labels", "unknown"):
            names = entry.get(field)
            if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
                raise ValueError(f"{where} has {field} {names!r}: write a list of names")
            if names is not None and not all(name.strip() for name in names):
                raise ValueError(f"{where} has an empty name among its {field}: give each class a name")
        line: dict[str, Any] = {"path": entry["path"]}
        for field in ("labels", "unknown"):
            names = entry.get(field)
            line[field] = None if names is None else [unicodedata.normalize("NFC", name) for name in names]
        lines.append((number, line))
    return lines


def _column(name: str, column_of: dict[str, int], number: int, path: Path) -> int:
    if name not in column_of:
        near = difflib.get_close_matches(name, column_of, n=1, cutoff=0.75)
        raise ValueError(
            f"line {number} of {str(path)!r} has the label {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}, "
            f"which is none of the {len(column_of)} classes: correct it, or add it to the classes"
        )
    return column_of[name]
