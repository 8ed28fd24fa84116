"""PASCAL VOC 2007 and 2012: photographs with 1–7 of 20 classes each.

M. Everingham et al., "The PASCAL Visual Object Classes Challenge", IJCV 2010. The layout that is read, which is that of
the archives:

    root/VOC2012/ImageSets/Main/trainval.txt    one image a line: 2008_000002
    root/VOC2012/Annotations/2008_000002.xml    its objects, <name> and <difficult> of each
    root/VOC2012/JPEGImages/2008_000002.jpg
    root/VOC2007/…                              likewise
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from mlssl.data.paths import check_files, check_names, first_repeated
from mlssl.data.records import Records

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

_ENCODING = re.compile(rb"""(?:\xef\xbb\xbf)?\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["'][^>]*\?>""")


def read_voc(
    root: str | os.PathLike[str], split: str = "2012/trainval", classes: Sequence[str] = VOC_CLASSES
) -> Records:
    """Read a split of PASCAL VOC: which classes each image shows, by its objects.

    A class is present (1) where an object of it is not difficult, unknown (−1) where all of them are difficult, and
    absent (0) where there is none; so say the files `ImageSets/Main/<class>_<split>.txt` too, with 1, 0 and −1.

    Args:
        root: Folder that holds `VOC2007` and `VOC2012`; the archives call it VOCdevkit.
        split: Year and list of images, such as "2012/trainval", "2012/val", "2007/trainval" or "2007/test".
        classes: Names of the objects, in the order of the labels; VOC's twenty by default.

    Returns:
        Images in the order of the list. Their ids are the digits of their names (2008_000002 becomes 2008000002), and
        0 … n − 1 where names have no such form.

    Raises:
        FileNotFoundError: The folder, the list, an annotation or an image is missing.
        ValueError: A split of another form, a list that is empty or names an image twice, or an annotation that is
            broken or names another class.
    """
    year, _, name = split.partition("/")
    if not (year and name):
        raise ValueError(f"VOC has no split {split!r}: pass year and list, such as '2012/trainval' or '2007/test'")
    folder = Path(root) / f"VOC{year}"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {str(folder)!r}: pass as root the folder with VOC2007/ and VOC2012/, which VOC calls VOCdevkit"
        )
    list_file = folder / "ImageSets" / "Main" / f"{name}.txt"
    stems = check_names(_stems(list_file, name), list_file)
    repeated = first_repeated(stems)
    if repeated:
        raise ValueError(f"{str(list_file)!r} lists {stems[repeated[1]]!r} twice: keep one of its lines")
    files = check_files(folder / "JPEGImages", [f"{stem}.jpg" for stem in stems], list_file)
    check_files(folder / "Annotations", [f"{stem}.xml" for stem in stems], list_file)
    column_of = {one: column for column, one in enumerate(classes)}
    labels = np.zeros((len(stems), len(classes)), dtype=np.int8)
    for row, stem in enumerate(stems):
        _read_objects(folder / "Annotations" / f"{stem}.xml", column_of, labels[row])
    return Records(
        files.names, labels, classes, image_ids=_ids(stems), root=folder / "JPEGImages", left_out=files.left_out
    )


def _stems(path: Path, name: str) -> list[str]:
    if not path.is_file():
        there = sorted(file.stem for file in path.parent.glob("*.txt") if "_" not in file.stem)
        raise FileNotFoundError(
            f"no list of images {str(path)!r} for split {name!r}: use one that is there, {', '.join(there) or 'none'}"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is no text in UTF-8 ({error}): fetch the data set again") from error
    # A list of a single class has 1, 0 or -1 behind each name.
    stems = [line.split()[0] for line in lines if line.strip()]
    if not stems:
        raise ValueError(f"{str(path)!r} lists no image: fetch the data set again")
    return stems


def _read_objects(path: Path, column_of: dict[str, int], labels: npt.NDArray[np.int8]) -> None:
    """Set the labels (L,) of an image: 1 outlasts −1, because one plain object is enough."""
    for one in _parsed(path).iter():
        if _local(one.tag) != "object":
            continue
        texts = {_local(part.tag): (part.text or "").strip() for part in reversed(one)}
        name, difficult = unicodedata.normalize("NFC", texts.get("name", "")), texts.get("difficult")
        if name not in column_of:
            raise ValueError(
                f"{str(path)!r} has an object of the class {name!r}, expected one of {', '.join(column_of)}: "
                "correct it, or call read_voc with classes of your own"
            )
        if difficult != "1":
            labels[column_of[name]] = 1
        elif labels[column_of[name]] == 0:
            labels[column_of[name]] = -1


def _parsed(path: Path) -> ElementTree.Element:
    content = path.read_bytes()
    try:
        try:
            return ElementTree.fromstring(content)
        except ValueError:  # expat knows no encoding of several bytes a letter but UTF-8 and UTF-16
            declared = _ENCODING.match(content)
            if declared is None:
                raise
            text = content.decode(declared[1].decode("ascii"))
            return ElementTree.fromstring(text[text.index("?>") + 2 :].lstrip())
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{str(path)!r} is not XML ({error}): fetch the annotation again") from error


def _local(tag: object) -> str:
    """A tag without its namespace; nothing of a comment, whose tag is a function."""
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""


def _ids(stems: list[str]) -> list[int] | None:
    digits = [stem.replace("_", "") for stem in stems]
    if not all(one.isascii() and one.isdigit() and len(one) < 19 for one in digits):
        return None
    ids = [int(one) for one in digits]
    return ids if len(set(ids)) == len(ids) else None
