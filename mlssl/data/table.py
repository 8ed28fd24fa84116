"""A CSV table of images: find its path and label columns, and read one-column-per-class labels."""

from __future__ import annotations

import csv
import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from mlssl.data.absent import absent_values
from mlssl.data.records import check_class_names

FIELDS = ("path", "labels", "unknown")

PATH_COLUMNS = ("path", "image", "file", "filename", "filepath", "imagepath", "imagename", "imagefile", "imageindex")
"""Headers recognised as the path column, ignoring case, blanks, dashes and underscores."""

LABEL_COLUMNS = ("labels", "label", "tags", "classes", "categories", "findinglabels")
"""Headers recognised as the column of class names."""

Line: TypeAlias = tuple[int, dict[str, str]]
"""Line number, from 1, and column → text."""

_FLAGS = {"1": 1, "1.0": 1, "true": 1, "0": 0, "0.0": 0, "false": 0, "-1": -1, "-1.0": -1, "": None}


def csv_lines(path: Path) -> tuple[list[str], list[Line]]:
    """Header and lines of a file.

    Raises:
        ValueError: It is not CSV in UTF-8, a column is repeated, or a line has a wrong number of fields.
        OSError: It cannot be read.
    """
    lines: list[Line] = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, ())]
            twice = next((column for column in header if header.count(column) > 1), None)
            if twice is not None:
                raise ValueError(
                    f"the header of {str(path)!r} has the column {twice!r} twice: give each column a unique name"
                )
            for values in reader:
                if not values:
                    continue
                if len(values) != len(header):
                    raise ValueError(
                        f"line {reader.line_num} of {str(path)!r} does not have the {len(header)} fields of the "
                        "header: quote commas in names"
                    )
                line = dict(zip(header, values, strict=True))
                lines.append((reader.line_num, line))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{str(path)!r} is not CSV in UTF-8 ({error}): save it as such") from error
    return header, lines


class Columns(NamedTuple):
    """Roles of the columns: class names, or one class each."""

    path: str
    names: str | None = None
    unknown: str | None = None
    flags: tuple[str, ...] = ()


def chosen_columns(
    header: list[str], lines: list[Line], path_column: str | None, label_columns: Sequence[str] | None, where: str
) -> Columns:
    """Choose columns by the given names, or by header names and values if unambiguous.

    Args:
        header: All column names.
        lines: Lines of the file.
        path_column: See `read_manifest`.
        label_columns: See `read_manifest`; a list.
        where: Origin of the header, for errors.

    Raises:
        ValueError: A given column is missing, or the choice is ambiguous.
    """
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
            return Columns(path or "path", label_columns[0], "unknown" if "unknown" in header else None)
        chosen = Columns(path or "path", flags=tuple(label_columns))
        _check_header(header, {*header}, path, where)
        return chosen
    names = _by_name(header, LABEL_COLUMNS, "label_columns", where)
    unknown = "unknown" if "unknown" in header else None
    others = [column for column in header if column not in (path, names, unknown)]
    if path and others and names is None and unknown is None and all(_is_flags(one, lines) for one in others):
        return Columns(path, flags=tuple(others))
    _check_header(header, {path, names, unknown}, path, where)
    return Columns(path or "path", names, unknown)


def labels_of_flags(
    lines: list[Line],
    columns: tuple[str, ...],
    classes: Sequence[str] | None,
    absent: int | str | Sequence[int | str] | None,
    path: Path,
    *,
    leave_out_others: bool = False,
) -> tuple[npt.NDArray[np.int8], tuple[str, ...], int]:
    """Labels from one column per class.

    Args:
        lines: Lines of the file.
        columns: Columns of the classes.
        classes: Names, in label order; the column names by default.
        absent: See `read_manifest`.
        path: The file, for errors.
        leave_out_others: Whether to leave out columns of other classes; otherwise they are an error.

    Returns:
        (n, L) labels, the L classes, and the number of present labels of other classes that were left out.

    Raises:
        ValueError: The columns do not match the classes, a value is not a label, or a blank has no defined meaning.
    """
    known = tuple(unicodedata.normalize("NFC", column) for column in columns)
    classes = None if classes is None else [unicodedata.normalize("NFC", one) for one in classes]
    missing = set(classes or ()) - set(known)
    if missing or (classes is not None and not leave_out_others and set(classes) != set(known)):
        assert classes is not None
        differing = sorted(missing if leave_out_others else set(classes) ^ set(known))
        raise ValueError(
            f"{str(path)!r} has {len(known)} columns of classes for {len(classes)} classes (only in one of them: "
            f"{', '.join(differing[:5])}): use the same columns in all files, or name them in label_columns"
        )
    check_class_names(known, path)
    by_value = absent_values(absent)
    values = np.zeros((len(lines), len(columns)), dtype=np.int8)
    blank = None
    for row, (number, line) in enumerate(lines):
        for index, column in enumerate(columns):
            text = line[column].strip().lower()
            if text not in _FLAGS:
                raise ValueError(
                    f"line {number} of {str(path)!r} has {line[column]!r} in the column {column!r}: "
                    "expected 1, 0 or -1, or leave the column out of label_columns"
                )
            flag = _FLAGS[text]
            if flag is None:
                blank = blank or (number, column)
                values[row, index] = by_value["blank"]
            else:
                values[row, index] = by_value["-1"] if flag == -1 else flag
    if blank and absent is None:
        raise ValueError(
            f"line {blank[0]} of {str(path)!r} is blank in the column {blank[1]!r}, which may mean absent or unknown: "
            "pass absent='blank' (--data.absent blank) for absent, or absent=0 (--data.absent "
            "0) for unknown"
        )
    order = [known.index(name) for name in classes or known]
    others = np.delete(values, order, axis=1)
    return values[:, order], tuple(classes or known), int((others == 1).sum())


def _by_name(header: Iterable[str], known: tuple[str, ...], option: str, where: str) -> str | None:
    """The column named like the first of `known`, or the only one named like any of them."""
    there = [column for column in header if re.sub(r"[\s_-]", "", column).lower() in known]
    if known[0] in there or len(there) == 1:
        return known[0] if known[0] in there else there[0]
    if there:
        raise ValueError(f"{where} has the columns {', '.join(there)}: choose one, {option}={there[0]!r}")
    return None


def _check_header(header: Sequence[str], expected: set[str | None], path: str | None, where: str) -> None:
    if path is None:
        raise ValueError(
            f"{where} has no path: expected path, labels and unknown, or pass path_column (--data.path_column), the "
            "column of the image paths"
        )
    for column in header:
        if column not in expected:
            near = difflib.get_close_matches(column, FIELDS, n=1)
            raise ValueError(
                f"{where} has the column {column!r}{f' (did you mean {near[0]!r}?)' if near else ''}: "
                "expected only path, labels and unknown, or pass the label columns, such as label_columns=['labels'] "
                "(--data.label_columns), to leave out the others"
            )


def _is_flags(column: str, lines: list[Line]) -> bool:
    values = {line[column].strip().lower() for _, line in lines}
    return values <= _FLAGS.keys() and values != {""}
