"""CVAT's format "CVAT for images 1.1": one XML file, and images below one folder.

::

    annotations.xml
        <annotations>
          <meta>…<label><name>car</name>…</label>…</meta>
          <image id="0" name="street/1.jpg" subset="Train"> <box label="car" …/> <tag label="night"/> </image>
    images/street/1.jpg    or images/Train/street/1.jpg
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

from mlssl.data.decoding import decode_rgb
from mlssl.data.named_labels import Entry, records_of_entries
from mlssl.data.records import Decode, Records
from mlssl.data.safe_xml import read_xml

SHAPES = frozenset({"box", "polygon", "polyline", "points", "ellipse", "cuboid", "skeleton", "mask", "tag"})
"""Elements whose label counts as present in the image."""


def read_cvat(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    *,
    subset: str | None = None,
    leave_out_others: bool = False,
    decode: Decode = decode_rgb,
    channels: int = 3,
) -> Records:
    """Read a CVAT file: the labels of each image, from its shapes and tags.

    Args:
        path: The file.
        images: Folder that image names are relative to. None: the folder "images" next to the file if it exists, else
            the folder of the file.
        classes: The L names, in label order; any other label is an error. None: the labels declared in the file, in
            file order, or else those of its shapes, in alphabetical order.
        subset: Subset to read, such as "Train"; all images by default.
        leave_out_others: Whether to leave out and count labels not in `classes`.
        decode: From a path to pixels uint8 (H, W, C), as for `Records`.
        channels: C that `decode` gives.

    Returns:
        Images in the order of the file; ids 0 … n − 1. An image without shapes or tags has a row of zeros.

    Raises:
        FileNotFoundError: The folder or an image is missing.
        ValueError: The file is not XML of this format, has no image in the subset, repeats an image, or has an empty or
            unknown label.
        OSError: The file cannot be read.
    """
    file = Path(path)
    root = read_xml(file)
    if root.tag != "annotations":
        raise ValueError(
            f"{str(file)!r} is XML of {root.tag!r}, not CVAT: export the task in its format 'CVAT for images 1.1'"
        )
    listed = [one for one in root if one.tag == "image"]
    if not listed:
        what = "tracks of a video" if any(one.tag == "track" for one in root) else "no image"
        raise ValueError(f"{str(file)!r} contains {what}: export the task in CVAT's format 'CVAT for images 1.1'")
    chosen = [(number, one) for number, one in enumerate(listed, start=1) if subset in (None, one.get("subset"))]
    if not chosen:
        there = sorted({one.get("subset") or "" for one in listed} - {""})
        raise ValueError(
            f"{str(file)!r} has no image of the subset {subset!r}: use an existing one, {', '.join(there) or 'none'}, "
            "or val_fraction (--data.val_fraction 0.1) to hold images out"
        )
    next_to_file = file.parent / "images"
    folder = Path(images) if images is not None else next_to_file if next_to_file.is_dir() else file.parent
    entries = [Entry(f"image {number}", _path(one, folder), _labels(one, file)) for number, one in chosen]
    return records_of_entries(
        entries,
        file,
        folder,
        classes,
        declared=_declared(root),
        leave_out_others=leave_out_others,
        decode=decode,
        channels=channels,
    )


def _path(image: Element, folder: Path) -> str | None:
    """Path of the image in the folder; each subset may have its own subfolder."""
    name, subset = image.get("name"), image.get("subset")
    if name and subset and "/" not in subset and subset != ".." and (folder / subset).is_dir():
        return f"{subset}/{name}"
    return name


def _labels(image: Element, file: Path) -> list[str]:
    names = []
    for shape in image:
        if shape.tag in SHAPES:
            name = (shape.get("label") or "").strip()
            if not name:
                raise ValueError(f"{str(file)!r} has a {shape.tag} without a label in {image.get('name')!r}: name it")
            names.append(unicodedata.normalize("NFC", name))
    return list(dict.fromkeys(names))


def _declared(root: Element) -> list[str] | None:
    """Labels of the task, without skeleton points, which have a parent."""
    names = []
    for meta in root:
        if meta.tag == "meta":
            for label in meta.iter("label"):
                if not (label.findtext("parent") or "").strip():
                    names.append(unicodedata.normalize("NFC", (label.findtext("name") or "").strip()))
    return list(dict.fromkeys(names)) or None
