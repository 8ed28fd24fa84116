"""COCO's layout (T.-Y. Lin et al., "Microsoft COCO", ECCV 2014): the years 2014 and 2017, or a data set of one's own.

root/annotations/instances_<split>.json    "images", "annotations" and "categories"
root/<split>/<file_name>
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mlssl.data.decoding import decode_rgb
from mlssl.data.paths import check_files, check_names, first_repeated
from mlssl.data.records import Decode, Records

_Ids: TypeAlias = npt.NDArray[np.int64]

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
    path = _annotation_file(folder, split)
    images, annotations, categories = _parse(path)
    image_ids = _unique_ids([image_id for image_id, _ in images], "images", path)
    names = check_names([name for _, name in images], path)
    repeated = first_repeated(names)
    if repeated:
        first, again = repeated
        raise ValueError(
            f"{str(path)!r} lists the image {names[again]!r} twice, under the ids {image_ids[first]} and "
            f"{image_ids[again]}: keep one of them, with the annotations of both"
        )
    _check_categories(categories, path)
    category_ids = _unique_ids([category["id"] for category in categories], "categories", path)
    by_id = np.argsort(category_ids)
    rows = _positions([image_id for image_id, _ in annotations], image_ids, "image_id", path)
    columns = _positions([category_id for _, category_id in annotations], category_ids[by_id], "category_id", path)
    labels = np.zeros((len(images), len(categories)), dtype=np.int8)
    labels[rows, columns] = 1
    files = check_files(folder / split, names, path)
    classes = [categories[column]["name"] for column in by_id]
    return Records(
        files.names,
        labels,
        classes,
        image_ids=image_ids,
        root=folder / split,
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


def _parse(path: Path) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]], list[dict[str, Any]]]:
    """Give (id, file name) of the images, (image id, category id) of the annotations, and the categories."""
    try:
        content = json.loads(path.read_bytes(), object_hook=_slim)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}): fetch the annotation file again") from error
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        found = ", ".join(content) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(
            f"{str(path)!r} holds {found}: expected an object with the lists images, annotations and categories"
        )
    images, annotations, categories = (content[key] for key in keys)
    if not (images and categories):
        raise ValueError(
            f"{str(path)!r} lists {len(images)} images and {len(categories)} categories: expected at least one of each"
        )
    complete = (
        all(isinstance(entry, _Image) for entry in images)
        and all(isinstance(entry, _Annotation) for entry in annotations)
        and all(isinstance(entry, dict) and {"id", "name"} <= entry.keys() for entry in categories)
    )
    if not complete:
        raise ValueError(
            f"{str(path)!r} has incomplete entries: expected id and file_name of each image, image_id and category_id "
            "of each annotation, id and name of each category"
        )
    return images, annotations, categories


def _check_categories(categories: Sequence[dict[str, Any]], path: Path) -> None:
    by_name: dict[str, Any] = {}
    for category in categories:
        name = category["name"]
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{str(path)!r} has the name {name!r} for category {category['id']}: write a name")
        composed = unicodedata.normalize("NFC", name)
        if composed in by_name:
            raise ValueError(
                f"{str(path)!r} has two categories named {name!r}, with the ids {by_name[composed]} and "
                f"{category['id']}: give the annotations of both one id, or each category its own name"
            )
        by_name[composed] = category["id"]


class _Image(tuple[Any, Any]):
    __slots__ = ()


class _Annotation(tuple[Any, Any]):
    __slots__ = ()


def _slim(entry: dict[str, Any]) -> object:
    # Outlines fill most of the file; dropped while it is parsed, they never lie in memory together.
    if "image_id" in entry and "category_id" in entry:
        return _Annotation((entry["image_id"], entry["category_id"]))
    if "file_name" in entry and "id" in entry:
        return _Image((entry["id"], entry["file_name"]))
    return entry


def _integers(values: Sequence[Any], what: str, path: Path) -> _Ids:
    wrong = [value for value in values if type(value) is not int or not -(2**63) <= value < 2**63]
    if wrong:
        raise ValueError(
            f"{str(path)!r} has {what} that are no integers, such as {wrong[0]!r}: "
            "expected COCO's integer ids, of at most 64 bits"
        )
    return np.array(values, dtype=np.int64)


def _unique_ids(values: Sequence[Any], what: str, path: Path) -> _Ids:
    ids = _integers(values, f"ids of {what}", path)
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) < len(ids):
        raise ValueError(
            f"{str(path)!r} has {what} that share an id, such as {unique[counts > 1][0]}: expected each id once"
        )
    return ids


def _positions(values: Sequence[Any], ids: _Ids, what: str, path: Path) -> _Ids:
    """Where in `ids`, which need not be sorted, each value stands."""
    wanted = _integers(values, f"annotations of {what}", path)
    order = np.argsort(ids)
    found = order[np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)]
    unknown = wanted[ids[found] != wanted]
    if len(unknown):
        raise ValueError(
            f"{len(unknown)} annotations in {str(path)!r} have a {what} that the file does not list, "
            f"first {unknown[0]}: drop them or add what they refer to"
        )
    return np.asarray(found, dtype=np.int64)
