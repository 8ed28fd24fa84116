"""COCO's layout (T.-Y. Lin et al., "Microsoft COCO", ECCV 2014): the years 2014 and 2017, or a custom data set.

root/annotations/instances_<split>.json    "images", "annotations" and "categories"
root/<split>/<file_name>

Alternatively, one such file anywhere and one image folder.
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
    """Read a split of COCO: the categories of each image, from its boxes.

    Args:
        root: Folder with `annotations` and the image folders.
        split: Such as "train2017", "val2017", "train2014" or "val2014".
        decode: Function from a path to pixels uint8 (H, W, C), see `Records`.
        channels: C of `decode`'s output.

    Returns:
        All images in the order of the annotation file, with COCO's image ids; an image without objects has a row of
        zeros. The classes are all categories, ascending by id. A crowd counts as present.

    Raises:
        FileNotFoundError: The folder, the annotation file or a listed image is missing.
        ValueError: The annotation file is not COCO JSON, lists an image twice, or has a category without a name or with
            the name of another.
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
    """Read one COCO file whose images are in one folder.

    Args:
        path: The file.
        images: Folder that file names are relative to; by default the folder of the file.
        decode: Function from a path to pixels uint8 (H, W, C), see `Records`.
        channels: C of `decode`'s output.

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
            advice = f"use an existing split: {', '.join(splits)}"
        else:
            advice = f"put it there (annotation files found: {', '.join(there) or 'none'})"
        raise FileNotFoundError(f"no annotation file {str(path)!r} for split {split!r}: {advice}")
    return path
