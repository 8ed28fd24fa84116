"""PASCAL VOC 2007 and 2012: images with 1–7 of 20 classes each.

M. Everingham et al., "The PASCAL Visual Object Classes Challenge", IJCV 2010. Expected layout, as in the archives:

    root/VOC2012/ImageSets/Main/trainval.txt    one image per line: 2008_000002
    root/VOC2012/Annotations/2008_000002.xml    its objects, <name> and <difficult> of each
    root/VOC2012/JPEGImages/2008_000002.jpg     or .png and others, from annotation tools
    root/VOC2007/…                              likewise
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlssl.data.decoding import decode_rgb
from mlssl.data.paths import IMAGE_EXTENSIONS, check_files, check_names, extension, first_repeated, listing
from mlssl.data.records import OTHER_CLASSES, Decode, Records, check_class_names
from mlssl.data.safe_xml import read_xml

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def read_voc(
    root: str | os.PathLike[str],
    split: str = "2012/trainval",
    classes: Sequence[str] = VOC_CLASSES,
    *,
    leave_out_others: bool = False,
    decode: Decode = decode_rgb,
) -> Records:
    """Read a split of PASCAL VOC: the classes of each image, from its objects.

    A class is present (1) if one of its objects is not difficult, unknown (−1) if all are difficult, and absent (0) if
    there are none, as in the files `ImageSets/Main/<class>_<split>.txt`.

    Args:
        root: Folder with `VOC2007` and `VOC2012`, named VOCdevkit in the archives.
        split: Year and image list, such as "2012/trainval", "2012/val", "2007/trainval" or "2007/test".
        classes: Class names of the objects, in label order; VOC's twenty by default.
        leave_out_others: Whether to leave out and count objects of other classes; otherwise they are an error.
        decode: Function from a path to pixels uint8 (H, W, 3), see `Records`.

    Returns:
        Images in list order. Ids are the digits of the names (2008_000002 becomes 2008000002), or 0 … n − 1 if the
        names have another form.

    Raises:
        FileNotFoundError: The folder, the list, an annotation or an image is missing.
        ValueError: The split is malformed, the list is empty or repeats an image, two image files share a name, or an
            annotation is malformed or names an unknown class.
    """
    year, _, name = split.partition("/")
    if not (year and name):
        raise ValueError(f"VOC has no split {split!r}: pass year and list, such as '2012/trainval' or '2007/test'")
    folder = Path(root) / f"VOC{year}"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {str(folder)!r}: pass as root the folder with VOC2007/ and VOC2012/, which VOC calls VOCdevkit"
        )
    classes = [unicodedata.normalize("NFC", one) for one in classes]
    check_class_names(classes)
    list_file = folder / "ImageSets" / "Main" / f"{name}.txt"
    stems = check_names(_stems(list_file, name, listing(folder / "Annotations")), list_file)
    repeated = first_repeated(stems)
    if repeated:
        raise ValueError(f"{str(list_file)!r} lists {stems[repeated[1]]!r} twice: keep one of its lines")
    files = check_files(folder / "JPEGImages", _image_names(folder / "JPEGImages", stems), list_file)
    check_files(folder / "Annotations", [f"{stem}.xml" for stem in stems], list_file)
    column_of = {one: column for column, one in enumerate(classes)}
    labels = np.zeros((len(stems), len(classes)), dtype=np.int8)
    left_out = Counter(files.left_out)
    for row, stem in enumerate(stems):
        path = folder / "Annotations" / f"{stem}.xml"
        left_out[OTHER_CLASSES] += _read_objects(path, column_of, labels[row], leave_out_others)
    return Records(
        files.names,
        labels,
        classes,
        image_ids=_ids(stems),
        root=folder / "JPEGImages",
        decode=decode,
        left_out=+left_out,
    )


def _stems(path: Path, name: str, annotations: set[str]) -> list[str]:
    if not path.is_file():
        there = sorted(file.stem for file in path.parent.glob("*.txt") if "_" not in file.stem)
        raise FileNotFoundError(
            f"no list of images {str(path)!r} for split {name!r}: use an existing one, {', '.join(there) or 'none'}"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text ({error}): fetch the data set again") from error
    stems = [_stem(line.strip(), annotations) for line in lines if line.strip()]
    if not stems:
        raise ValueError(f"{str(path)!r} lists no image: fetch the data set again")
    return stems


def _stem(line: str, annotations: set[str]) -> str:
    """A line without the flag 1, 0 or −1 that single-class lists have after each name."""
    name, _, flag = line.rpartition(" ")
    return name.rstrip() if flag in ("1", "0", "-1") and name and f"{line}.xml" not in annotations else line


def _image_names(folder: Path, stems: list[str]) -> list[str]:
    """File of each image: .jpg in VOC, also .png and others from annotation tools."""
    there: dict[str, list[str]] = {}
    for file in listing(folder):
        if extension(file) in IMAGE_EXTENSIONS:
            there.setdefault(unicodedata.normalize("NFC", file[: -len(extension(file))]), []).append(file)
    names = []
    for stem in stems:
        found = sorted(there.get(unicodedata.normalize("NFC", stem), ()))
        if len(found) > 1:
            raise ValueError(
                f"{str(folder)!r} contains {' and '.join(found)}, which share one annotation: keep one of them, or "
                "give each its own name"
            )
        names.append(found[0] if found else f"{stem}.jpg")
    return names


def _read_objects(path: Path, column_of: dict[str, int], labels: npt.NDArray[np.int8], leave_out_others: bool) -> int:
    """Set the labels (L,) of an image and return the number of objects left out; 1 overrides −1."""
    left_out = 0
    for one in read_xml(path).iter("object"):
        texts = {part.tag: (part.text or "").strip() for part in reversed(one)}
        name, difficult = unicodedata.normalize("NFC", texts.get("name", "")), texts.get("difficult")
        if name not in column_of:
            if leave_out_others and name:
                left_out += 1
                continue
            raise ValueError(
                f"{str(path)!r} has an object of the class {name!r}, expected one of {', '.join(column_of)}: "
                "correct it, or pass the classes of this set, classes=[…] (--data.classes '[…]')"
            )
        if difficult != "1":
            labels[column_of[name]] = 1
        elif labels[column_of[name]] == 0:
            labels[column_of[name]] = -1
    return left_out


def _ids(stems: list[str]) -> list[int] | None:
    digits = [stem.replace("_", "") for stem in stems]
    if not all(one.isascii() and one.isdigit() and len(one) < 19 for one in digits):
        return None
    ids = [int(one) for one in digits]
    return ids if len(set(ids)) == len(ids) else None
