"""Files of annotations by what stands in them: COCO's and Label Studio's JSON, CVAT's XML, and manifests."""

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
"""Of a file, to look for its first sign in."""


class Source(NamedTuple):
    """Where a set is read from, or a part of it."""

    name: str
    read: Callable[[Sequence[str] | None, bool], Records]
    """From the classes of its labels, or None, and whether to leave out labels of others."""

    is_open: bool
    """Whether labels that it does not name are absent; one that is not declares its classes and has no others."""


def annotation_source(path: str, images: str | None, options: SetOptions, split: str | None) -> Source:
    """A file of annotations to read.

    Args:
        path: The file.
        images: Folder of its images; that of the file by default.
        options: How it is written.
        split: Subset of the images, which CVAT's files may have.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is none of these formats, not of the one that was given, or options are not for it.
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
            raise ValueError(f"{option} ({value!r}) was given, which is not for {path!r}, {kind.name}: {advice}")
    how["decode"] = decode_rgb if options.white is None else partial(decode_rgb, white=options.white)
    return Source(path, lambda classes, leave_out: kind.read(file, images, classes, leave_out, how), kind.is_open)


class _Kind(NamedTuple):
    name: str
    dataset: str | None
    """The format of whole folders that has such files."""

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
        what = "is a folder" if file.is_dir() else "is not there"
        raise FileNotFoundError(
            f"annotations {str(file)!r} {what}: pass a file of COCO, Label Studio or CVAT, or a manifest, or root "
            "for a whole folder"
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
        f"{str(file)!r} begins with {sign!r}: expected JSON of COCO or Label Studio, XML of CVAT, or a manifest that "
        "ends in .csv or .jsonl"
    )


_SIGNS = {"{": _COCO, "[": _LABEL_STUDIO, "<": _CVAT}
