"""Label Studio's exports "JSON" and "JSON-MIN": a list of tasks, and images below one folder.

JSON        [{"id": 1, "data": {"image": "/data/upload/1/0a1b2c3d-1.jpg"},
              "annotations": [{"result": [{"type": "choices", "value": {"choices": ["night"]}},
                                          {"type": "rectanglelabels", "value": {"rectanglelabels": ["car"], …}}]}]}]
JSON-MIN    [{"id": 1, "image": "/data/local-files/?d=street/1.jpg",
              "scene": {"choices": ["night", "rain"]}, "label": [{"rectanglelabels": ["car"], …}]}]
"""

from __future__ import annotations

import difflib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from mlssl.data.decoding import decode_rgb
from mlssl.data.named_labels import Entry, records_of_entries
from mlssl.data.paths import IMAGE_EXTENSIONS, extension, listing
from mlssl.data.records import Decode, Records

_OF_LABELS = re.compile("choices|labels|[a-z]+labels")
"""Result types, also the keys of their names: choices, rectanglelabels, polygonlabels, …"""

_META = frozenset({"id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "comment"})
"""Keys of a JSON-MIN task that do not describe the image."""

_UPLOADED = re.compile(r"[0-9a-f]{8}-")
"""Prefix that Label Studio adds to the name of an uploaded file."""


def read_label_studio(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    *,
    path_column: str | None = None,
    label_columns: str | Sequence[str] | None = None,
    leave_out_others: bool = False,
    decode: Decode = decode_rgb,
    channels: int = 3,
) -> Records:
    """Read a Label Studio export: the choices and labels of each image.

    A label that only some annotators of a task chose is unknown; all labels of a skipped or unannotated task are
    unknown.

    Args:
        path: The file.
        images: Folder of the images; by default the folder of the file. An image is found by the longest suffix of its
            path that exists there, with or without the upload prefix of its name.
        classes: The L names, in label order; any other name is an error. None: all names in the file, in alphabetical
            order.
        path_column: Key of the image in the data of a task. None: the one key whose value is an image path.
        label_columns: Controls (`from_name`; keys of JSON-MIN) whose labels count. None: all choices and labels.
        leave_out_others: Whether to leave out, and count, labels of other classes than `classes`.
        decode: From a path to pixels uint8 (H, W, C), as for `Records`.
        channels: C that `decode` gives.

    Returns:
        Images in the order of the file; ids 0 … n − 1.

    Raises:
        FileNotFoundError: The folder or an image is missing.
        ValueError: The file is not JSON of this format, has no task, a task has no image or several, an image is
            repeated, or a label is empty or unknown.
        OSError: The file cannot be read.
    """
    file = Path(path)
    folder = file.parent if images is None else Path(images)
    wanted = [label_columns] if isinstance(label_columns, str) else label_columns
    tasks = _tasks(file)
    is_min = not any("data" in task for task in tasks)
    if is_min and wanted is None:
        _check_texts(tasks, path_column, file)
    found: dict[Any, _Task] = {}
    for number, task in enumerate(tasks, start=1):
        where = f"task {number} of {str(file)!r}"
        key = ("id", task["id"]) if is_min and isinstance(task.get("id"), (int, str)) else ("number", number)
        data = task if is_min else task["data"]
        image = data[_image_key(data, path_column, where)]
        if key in found and found[key].image == image:  # JSON-MIN has one task per annotation
            found[key].annotations.append(_names_of_min(task, wanted, where))
            continue
        if is_min:
            names = _names_of_min(task, wanted, where)
            annotations = [names] if names or "annotation_id" in task else []
        else:
            annotations = _annotations(task, wanted, where)
        found[key if key not in found else ("number", number)] = _Task(f"task {number}", image, annotations)
    if wanted is not None:
        _check_controls(tasks, wanted, file)
    find_image = _ImageFinder(folder)
    entries = [Entry(one.where, find_image(one.image), *_agreed(one.annotations)) for one in found.values()]
    disagreed = sum(len(entry.unknown) for entry in entries)
    counts = Counter({"tasks skipped or not annotated": sum(not one.annotations for one in found.values())})
    return records_of_entries(
        entries,
        file,
        folder,
        classes,
        leave_out_others=leave_out_others,
        left_out=counts + Counter({"labels that annotators disagree on": disagreed}),
        decode=decode,
        channels=channels,
    )


class _Task(NamedTuple):
    where: str
    image: Any
    annotations: list[list[str]]


def _tasks(file: Path) -> list[dict[str, Any]]:
    try:
        tasks = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is not JSON ({error}): export the project again") from error
    if not (isinstance(tasks, list) and tasks and all(isinstance(task, dict) for task in tasks)):
        what = "no task" if tasks == [] else "something other than a list of tasks"
        raise ValueError(f"{str(file)!r} contains {what}: export the project in Label Studio's format JSON or JSON-MIN")
    with_data = [isinstance(task.get("data"), dict) for task in tasks]
    if any("data" in task for task in tasks) and not all(with_data):
        number = with_data.index(False) + 1
        raise ValueError(f"task {number} of {str(file)!r} has no data, but others have: export the project again")
    return tasks


def _image_key(data: dict[str, Any], path_column: str | None, where: str) -> str:
    if path_column is not None:
        if path_column not in data:
            raise ValueError(f"{where} has no {path_column!r}: it has {', '.join(data) or 'nothing'}")
        return path_column
    keys = [key for key, value in data.items() if isinstance(value, str) and extension(_file_path(value)) in _ENDS]
    if len(keys) != 1:
        raise ValueError(
            f"{where} has {len(keys)} image paths ({', '.join(keys) or ', '.join(data) or 'nothing'}): pass "
            "path_column (--data.path_column), the key of the image"
        )
    return keys[0]


_ENDS = frozenset(IMAGE_EXTENSIONS)


def _annotations(task: dict[str, Any], wanted: Sequence[str] | None, where: str) -> list[list[str]]:
    """Names of each annotation of a JSON task, without cancelled annotations."""
    annotations = task.get("annotations", task.get("completions")) or []
    if not isinstance(annotations, list) or not all(isinstance(one, dict) for one in annotations):
        raise ValueError(f"{where} has annotations {annotations!r:.40}: export the project again")
    return [
        _unique(_names_of_result(one.get("result"), wanted, where))
        for one in annotations
        if not one.get("was_cancelled")
    ]


def _names_of_result(result: Any, wanted: Sequence[str] | None, where: str) -> Iterator[str]:
    if not isinstance(result, list) or not all(isinstance(one, dict) for one in result):
        raise ValueError(f"{where} has the result {result!r:.40}: expected a list, export the project again")
    for one in result:
        if wanted is None or one.get("from_name") in wanted:
            yield from _names_of_value(one.get("value"), where)


def _names_of_value(value: Any, where: str) -> Iterator[str]:
    """Names in {"choices": […]}, {"rectanglelabels": […], "x": …} and the like."""
    for key, names in value.items() if isinstance(value, dict) else ():
        if _OF_LABELS.fullmatch(str(key)):
            if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
                raise ValueError(f"{where} has {key} {names!r:.40}: expected a list of non-empty names")
            yield from names


def _names_of_min(task: dict[str, Any], wanted: Sequence[str] | None, where: str) -> list[str]:
    """Names of one annotation, from lists and objects; a text is a single choice."""
    names: list[str] = []
    for key, value in task.items():
        if wanted is not None and key not in wanted:
            continue
        if isinstance(value, str) and wanted is not None:
            names.append(value)
        for one in value if isinstance(value, list) else [value]:
            names += _names_of_value(one, where)
    if not all(name.strip() for name in names):
        raise ValueError(f"{where} has an empty label: write a name, or leave it out")
    return _unique(names)


def _check_texts(tasks: Sequence[dict[str, Any]], path_column: str | None, file: Path) -> None:
    """Refuse texts that may be a choice or a caption."""
    for number, task in enumerate(tasks, start=1):
        for key, value in task.items():
            if key in _META or key == path_column or not isinstance(value, str):
                continue
            if extension(_file_path(value)) not in _ENDS:
                raise ValueError(
                    f"task {number} of {str(file)!r} has the text {value!r:.40} as {key!r}, which may be a choice or a "
                    f"caption: pass label_columns (--data.label_columns), the keys of the labels, such as [{key}]"
                )


def _check_controls(tasks: Sequence[dict[str, Any]], wanted: Sequence[str], file: Path) -> None:
    """Refuse unknown control names."""
    results = [
        one
        for task in tasks
        for annotation in task.get("annotations", task.get("completions")) or ()
        if not annotation.get("was_cancelled")  # only uncancelled ones were checked
        for one in annotation["result"]
    ]
    known = (
        {str(one.get("from_name")) for one in results} if "data" in tasks[0] else {key for one in tasks for key in one}
    )
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"{str(file)!r} has no control {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}: it has "
                f"{', '.join(sorted(known)) or 'none'}"
            )


def _unique(names: Sequence[str] | Iterator[str]) -> list[str]:
    return list(dict.fromkeys(unicodedata.normalize("NFC", name.strip()) for name in names))


def _agreed(annotations: list[list[str]]) -> tuple[list[str] | None, list[str]]:
    """Names in all annotations, and names in only some; None without annotations."""
    if not annotations:
        return None, []
    counts = Counter(name for names in annotations for name in names)
    return (
        [name for name, number in counts.items() if number == len(annotations)],
        [name for name, number in counts.items() if number < len(annotations)],
    )


def _file_path(address: str) -> str:
    """Path in an address: the query of /data/local-files/?d=a/1.jpg, or the path of a URL."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return address
    if parts.path.rstrip("/").endswith("/data/local-files"):
        return (parse_qs(parts.query).get("d") or [""])[0].replace("\\", "/")
    return unquote(parts.path) if parts.scheme or parts.netloc or address.startswith("/data/") else address


class _ImageFinder:
    """Finds images below a folder by the longest existing suffix of their paths; lists every folder once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listings: dict[str, set[str]] = {}

    def __call__(self, address: Any) -> Any:
        if not isinstance(address, str):
            return address
        parts = [part for part in _file_path(address).split("/") if part not in ("", ".")]
        if not parts or ".." in parts:
            return address
        names = [parts[-1]] + ([parts[-1][9:]] if _UPLOADED.match(parts[-1]) else [])
        for name in names:
            for start in range(len(parts)):
                parent = "/".join(parts[start:-1])
                if name in self._in(parent):
                    return f"{parent}/{name}" if parent else name
        return "/".join(parts)

    def _in(self, parent: str) -> set[str]:
        if parent not in self._listings:
            self._listings[parent] = listing(self._folder / parent)
        return self._listings[parent]
