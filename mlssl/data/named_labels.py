"""Build `Records` from lists of images with class names, whatever file they come from."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mlssl.data.paths import check_files, check_names, first_repeated
from mlssl.data.records import OTHER_CLASSES, Decode, Records, check_class_names

SEPARATOR = "|"
"""Default separator of the names in a field."""

_IN_LIST = re.compile(r"""\s*(?:'([^']*)'|"([^"]*)"|([^,'"\[\]]+))\s*(?:,|(?=['"])|$)""")


class Entry(NamedTuple):
    """An entry of a list of images."""

    where: str
    """Location in the file, such as "line 3"."""

    path: Any
    """Path of the image as the file gives it, not yet checked."""

    labels: Sequence[str] | None
    """Names of its classes in Unicode form NFC; None if unlabelled."""

    unknown: Sequence[str] = ()
    """Names of classes whose presence is unknown."""


def records_of_entries(
    entries: Sequence[Entry],
    source: Path,
    folder: Path,
    classes: Sequence[str] | None = None,
    *,
    declared: Sequence[str] | None = None,
    leave_out_others: bool = False,
    left_out: Mapping[str, int] | None = None,
    decode: Decode,
    channels: int = 3,
) -> Records:
    """Make records from a list of images and check that the files exist.

    A class that an entry does not name is absent. If only some entries are labelled, all classes of the others are
    unknown (−1); if none is, the records are unlabelled.

    Args:
        entries: At least one.
        source: The file, for errors.
        folder: Folder that the paths are relative to.
        classes: The L names, in label order. None: the declared names, or else all names in alphabetical order.
        declared: Names declared by the file.
        leave_out_others: Whether to leave out and count labels of other classes; otherwise they are an error.
        left_out: Counts of what the reader left out, see `Records`.
        decode: See `Records`.
        channels: See `Records`.

    Raises:
        FileNotFoundError: An image is missing.
        ValueError: A path is repeated or leaves the folder, or a name is unknown or both present and unknown.
    """
    names = check_names([entry.path for entry in entries], source)
    check_repeated(names, [entry.where for entry in entries], source)
    files = check_files(folder, names, source)
    counts = Counter(files.left_out) + Counter(left_out or {})
    settings: dict[str, Any] = {"root": folder, "decode": decode, "channels": channels}
    if all(entry.labels is None for entry in entries):
        return Records(files.names, **settings, left_out=counts)
    named = sorted({name for entry in entries for name in (*(entry.labels or ()), *entry.unknown)})
    known = [unicodedata.normalize("NFC", name) for name in classes or declared or named]
    if not known:
        raise ValueError(f"{str(source)!r} has a label field but no labels: fill it, or leave it out")
    check_class_names(known, source)
    labels, num_others = _labels(entries, known, source, leave_out_others=leave_out_others)
    return Records(files.names, labels, known, **settings, left_out=counts + Counter({OTHER_CLASSES: num_others}))


def check_repeated(names: Sequence[str], places: Sequence[str], source: Path) -> None:
    """Refuse a repeated path, in any spelling.

    Args:
        names: Paths.
        places: Location of each in the file.
        source: The file.

    Raises:
        ValueError: A path is repeated; names both locations.
    """
    repeated = first_repeated(names)
    if repeated:
        first, again = repeated
        raise ValueError(
            f"{places[again]} of {str(source)!r} repeats {names[again]!r} of {places[first]}: keep one of them"
        )


def split_names(
    lines: Sequence[tuple[int, Mapping[str, str]]],
    columns: Mapping[str, str],
    separator: str | None,
    classes: Sequence[str] | None,
    path: Path,
) -> list[dict[str, list[str]]]:
    """Split the name fields of each line of a table.

    Args:
        lines: (line number, column → text) of each line.
        columns: Meaning of the names ("labels", "unknown") → column.
        separator: See `read_manifest`.
        classes: See `read_manifest`.
        path: The file, for errors.

    Returns:
        For each line: meaning → names.

    Raises:
        ValueError: A list is malformed, or names seem to use another separator.
    """
    written = [(number, line[one]) for number, line in lines for one in columns.values() if line[one].strip()]
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

    return [{field: split(number, line[column]) for field, column in columns.items()} for number, line in lines]


def _labels(
    entries: Sequence[Entry], known: Sequence[str], source: Path, *, leave_out_others: bool
) -> tuple[npt.NDArray[np.int8], int]:
    """Labels (n, L), and the number of labels of other classes that were left out."""
    column_of = {name: column for column, name in enumerate(known)}
    labels = np.zeros((len(entries), len(known)), dtype=np.int8)
    num_others = 0
    for row, entry in enumerate(entries):
        if entry.labels is None:
            labels[row] = -1
        for names, value in ((entry.unknown, -1), (entry.labels or (), 1)):
            for name in names:
                if name in column_of:
                    labels[row, column_of[name]] = value
                elif leave_out_others:
                    num_others += value == 1
                else:
                    raise ValueError(_no_class(name, known, entry.where, source))
        both = set(entry.labels or ()) & set(entry.unknown)
        if both:
            raise ValueError(
                f"{entry.where} of {str(source)!r} has {sorted(both)[0]!r} as a label and as unknown: keep one"
            )
    return labels, num_others


def _no_class(name: str, known: Sequence[str], where: str, source: Path) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return (
        f"{where} of {str(source)!r} has the label {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}, "
        f"which is not one of the {len(known)} classes: correct it, or pass all of them, classes=[…] (--data.classes …)"
    )


def _check_separator(written: list[tuple[int, str]], path: Path) -> None:
    """Refuse names that look like several names joined by another separator."""
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
    names, position, inside = [], 0, text[1:-1].strip()
    while position < len(inside):
        match = _IN_LIST.match(inside, position)
        if not match:
            raise ValueError(
                f"line {number} of {str(path)!r} has the labels {text!r}: write a list as ['sky', 'sea'], or sky|sea"
            )
        names.append(next(group for group in match.groups() if group is not None))
        position = match.end()
    return names
