"""Detect the format of an annotation file: COCO or Label Studio JSON, CVAT XML, or a manifest."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mlssl.data.decoding import decode_rgb
from mlssl.data.readers.coco import read_coco_file
from mlssl.data.readers.cvat import read_cvat
from mlssl.data.readers.label_studio import read_label_studio
from mlssl.data.readers.manifest import read_manifest
from mlssl.data.records import Records
from mlssl.data.set_options import SetOptions

_NUM_BYTES = 4096
"""Read from the start of a file to find its first character."""


class Source(NamedTuple):
    """Where a data set, or part of one, is read from."""

    name: str
    read: Callable[[Sequence[str] | None, bool], Records]
    """Takes the classes, or None, and whether to leave out labels of other classes."""

    is_open: bool
    """Whether a class it does not name is absent. A source that is not open declares all of its classes."""


def annotation_source(path: str, images: str | None, options: SetOptions, split: str | None) -> Source:
    """Choose the reader of an annotation file.

    Args:
        path: The file.
        images: Folder of its images; by default the folder of the file.
        options: How the file is written.
        split: Subset of the images, for CVAT files.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The format is unknown or not the one given, or an option does not apply to it.
        OSError: It cannot be read.
    """
    file = Path(path)
    kind = _kind(file)
    if options.dataset not in (None, "synthetic", kind.dataset):
        raise ValueError(f"dataset={options.dataset!r} was given, and {path!r} is {kind.name}: leave dataset out")
    how = {name: getattr(options, name) for name in ("separator", "path_column", "label_columns", "absent")}
    how = {name: value for name, value in {**how, "subset": split}.items() if value is not None}
    for name, value in how.items():
        if name not in kind.takes:
            option, advice = name, "leave it out"
            if name == "subset":
                option, advice = "a split", "pass val_annotations or val_fraction for a validation set"
            raise ValueError(f"{option} ({value!r}) was given, which does not apply to {path!r}, {kind.name}: {advice}")
    how["decode"] = decode_rgb if options.white is None else partial(decode_rgb, white=options.white)
    return Source(path, lambda classes, leave_out: kind.read(file, images, classes, leave_out, how), kind.is_open)


class _Kind(NamedTuple):
    name: str
    dataset: str | None
    """The folder format that contains such files."""

    takes: tuple[str, ...]
    read: Callable[[Path, str | None, Sequence[str] | None, bool, dict[str, Any]], Records]
    is_open: bool = True


_COCO = _Kind(
    "COCO's JSON", "coco", (), lambda file, images, _, __, how: read_coco_file(file, images, **how), is_open=False
)
_LABEL_STUDIO = _Kind(
    "Label Studio's JSON",
    None,
    ("path_column", "label_columns"),
    lambda file, images, classes, leave_out, how: read_label_studio(
        file, images, classes, leave_out_others=leave_out, **how
    ),
)
_CVAT = _Kind(
    "CVAT's XML",
    None,
    ("subset",),
    lambda file, images, classes, leave_out, how: read_cvat(file, images, classes, leave_out_others=leave_out, **how),
)
_MANIFEST = _Kind(
    "a manifest",
    "manifest",
    ("separator", "path_column", "label_columns", "absent"),
    lambda file, images, classes, leave_out, how: read_manifest(
        file, classes, root=images, leave_out_others=leave_out, **how
    ),
)


def _kind(file: Path) -> _Kind:
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"annotations {str(file)!r} {what}: pass a COCO, Label Studio or CVAT file or a manifest, or root for a "
            "folder"
        )
    if file.suffix.lower() in (".csv", ".jsonl", ".ndjson"):
        return _MANIFEST
    with file.open("rb") as opened:
        start = opened.read(_NUM_BYTES)
    for mark, encoding in ((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"), (b"", "utf-8-sig")):
        if start.startswith(mark):
            sign = start.decode(encoding, errors="ignore").lstrip()[:1]
            break
    if sign in _SIGNS:
        return _SIGNS[sign]
    raise ValueError(
        f"{str(file)!r} begins with {sign!r}: expected COCO or Label Studio JSON, CVAT XML, or a .csv or .jsonl "
        "manifest"
    )


_SIGNS = {"{": _COCO, "[": _LABEL_STUDIO, "<": _CVAT}
