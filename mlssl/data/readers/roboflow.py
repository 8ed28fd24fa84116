"""Roboflow exports: one folder per split, with images and one annotation file.

root/train/_annotations.coco.json    "COCO"
root/train/_classes.csv              or "Multi-Label Classification": one column per class, of 1 and 0
root/train/<image>
root/valid/…, root/test/…            likewise
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mlssl.data.coco_json import read_coco_json
from mlssl.data.decoding import decode_rgb
from mlssl.data.named_labels import check_repeated
from mlssl.data.paths import check_files, check_names
from mlssl.data.records import Decode, Records
from mlssl.data.table import chosen_columns, csv_lines, labels_of_flags

COCO_FILE, CLASSES_FILE = "_annotations.coco.json", "_classes.csv"


def read_roboflow(
    root: str | os.PathLike[str],
    split: str = "train",
    classes: Sequence[str] | None = None,
    *,
    decode: Decode = decode_rgb,
    channels: int = 3,
) -> Records:
    """Read a split of a Roboflow export in COCO or Multi-Label Classification format.

    Args:
        root: Folder with one folder per split.
        split: Folder in it, "train", "valid" or "test".
        classes: The L names, in label order, for a CSV file, whose column order may differ between splits. None: file
            order.
        decode: From a path to pixels uint8 (H, W, C), as for `Records`.
        channels: C that `decode` gives.

    Returns:
        Images in file order; ids from COCO, or 0 … n − 1.

    Raises:
        FileNotFoundError: The folder, its file or an image is missing.
        ValueError: The folder has both files; a file is malformed, repeats an image, or has two classes with one name.
    """
    folder = Path(root) / split
    if not folder.is_dir():
        there = sorted(path.name for path in Path(root).glob("*") if _files(path))
        raise FileNotFoundError(
            f"no folder {str(folder)!r}: pass as root the folder with Roboflow's train/ and valid/, and an existing "
            f"split: {', '.join(there) or 'none'}"
        )
    found = _files(folder)
    if not found:
        raise FileNotFoundError(
            f"no {COCO_FILE} and no {CLASSES_FILE} in {str(folder)!r}: export the data set in Roboflow's format COCO "
            "or Multi-Label Classification"
        )
    if len(found) > 1:
        raise ValueError(f"{str(folder)!r} has both {COCO_FILE} and {CLASSES_FILE}: keep the one to read")
    path = found[0]
    if path.name == COCO_FILE:
        content = read_coco_json(path)
        names, labels, known, ids = content.names, content.labels, tuple(content.classes), content.image_ids
    else:
        header, lines = csv_lines(path)
        if not lines:
            raise ValueError(f"{str(path)!r} lists no image: export the data set again")
        flags = [column for column in header if column != "filename"]
        columns = chosen_columns(header, lines, "filename", flags, f"the header of {str(path)!r}")
        names = check_names([line[columns.path] for _, line in lines], path)
        check_repeated(names, [f"line {number}" for number, _ in lines], path)
        labels, known, _ = labels_of_flags(lines, tuple(flags), classes, None, path)
        ids = None
    files = check_files(folder, names, path)
    return Records(
        files.names,
        labels,
        known,
        image_ids=ids,
        root=folder,
        decode=decode,
        channels=channels,
        left_out=files.left_out,
    )


def has_split(root: str | os.PathLike[str], split: str) -> bool:
    """Whether the split exists."""
    return bool(_files(Path(root) / split))


def _files(folder: Path) -> list[Path]:
    return [folder / name for name in (COCO_FILE, CLASSES_FILE) if (folder / name).is_file()]
