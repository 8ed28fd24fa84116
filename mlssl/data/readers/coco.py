"""COCO's layout (T.-Y. Lin et al., "Microsoft COCO", ECCV 2014): the years 2014 and 2017, or a data set of one's own.

root/annotations/instances_<split>.json    "images", "annotations" and "categories"
root/<split>/<file_name>

Or one such file anywhere, and one folder of images.
"""

from __future__ import annotations

import os
from pathlib import Path

from mlssl.data.coco_json import read_coco_json
from mlssl.data.decoding import decode_rgb
from mlssl.data.paths import check_files
from mlssl.data.records import Decode, Records

_PREFIX, _SUFFIX = "instances_", ".json"


def read_coco(
    root: str | os.PathLike[str], split: str = "train2017", *, decode: Decode = decode_rgb, channels: int = 3
) -> Records:
    """Read a split of COCO: which categories each image shows, by its boxes.

    Args:
        root: Folder that holds `annotations` and the folders of images.
        split: Such as "train2017", "val2017", "train2014" or "val2014".
        decode: From a path to pixels uint8 (H, W, C), as for `Records`.
        channels: C that `decode` gives.

    Returns:
        Every image in the order of the annotation file, with COCO's image ids; one without an object has a row of
        zeros. The classes are all categories in ascending order of their ids. A crowd counts as present.

    Raises:
        FileNotFoundError: The folder, the annotation file or an image that it names is missing.
        ValueError: The annotation file is not JSON or not of COCO's format, lists an image twice, or has two categories
            of one name or one without a name.
    """
    folder = Path(root)
    return read_coco_file(_annotation_file(folder, split), folder / split, decode=decode, channels=channels)


def read_coco_file(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    decode: Decode = decode_rgb,
    channels: int = 3,
) -> Records:
    """Read one file of COCO's format whose images lie in one folder.

    Args:
        path: The file.
        images: Folder that its file names start from; that of the file by default.
        decode: From a path to pixels uint8 (H, W, C), as for `Records`.
        channels: C that `decode` gives.

    Returns:
        As `read_coco`.

    Raises:
        FileNotFoundError: The folder or an image is missing.
        ValueError: As `read_coco`.
        OSError: The file cannot be read.
    """
    file = Path(path)
    content = read_coco_json(file)
    folder = file.parent if images is None else Path(images)
    files = check_files(folder, content.names, file)
    return Records(
        files.names,
        content.labels,
        content.classes,
        image_ids=content.image_ids,
        root=folder,
        decode=decode,
        channels=channels,
        left_out=files.left_out,
    )


def _annotation_file(folder: Path, split: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {str(folder)!r}: pass as root the folder with COCO's annotations/ and images"
        )
    path = folder / "annotations" / f"{_PREFIX}{split}{_SUFFIX}"
    if not path.is_file():
        there = sorted(file.name for file in path.parent.glob(f"*{_SUFFIX}"))
        splits = [name[len(_PREFIX) : -len(_SUFFIX)] for name in there if name.startswith(_PREFIX)]
        if splits:
            advice = f"use a split that is there: {', '.join(splits)}"
        else:
            advice = f"put it there (annotation files found: {', '.join(there) or 'none'})"
        raise FileNotFoundError(f"no annotation file {str(path)!r} for split {split!r}: {advice}")
    return path
