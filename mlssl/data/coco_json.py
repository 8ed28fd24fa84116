"""Parse a COCO JSON file: images, categories, and which categories each image shows."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from mlssl.data.paths import check_names, first_repeated

_Ids: TypeAlias = npt.NDArray[np.int64]


class CocoFile(NamedTuple):
    """Contents of a COCO file with n images and L categories."""

    names: list[str]
    """File names, in file order."""

    image_ids: _Ids
    """(n,)"""

    labels: npt.NDArray[np.int8]
    """(n, L), 1 if the image has an annotation of the category, crowds included, else 0."""

    classes: list[str]
    """Category names, ascending by id."""


def read_coco_json(path: Path) -> CocoFile:
    """Read a COCO file.

    Raises:
        ValueError: It is not COCO JSON, lists an image twice or outside the folder, or has a category without a name or
            with the name of another.
        OSError: It cannot be read.
    """
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
    categories = _without_root(categories, annotations)
    _check_categories(categories, path)
    category_ids = _unique_ids([category["id"] for category in categories], "categories", path)
    by_id = np.argsort(category_ids)
    rows = _positions([image_id for image_id, _ in annotations], image_ids, "image_id", path)
    columns = _positions([category_id for _, category_id in annotations], category_ids[by_id], "category_id", path)
    labels = np.zeros((len(images), len(categories)), dtype=np.int8)
    labels[rows, columns] = 1
    return CocoFile(names, image_ids, labels, [categories[column]["name"] for column in by_id])


def _without_root(categories: list[dict[str, Any]], annotations: Sequence[tuple[Any, Any]]) -> list[dict[str, Any]]:
    """Drop the root category that Roboflow adds: the unused supercategory of all others."""
    if len(categories) < 2:
        return categories
    used = {category_id for _, category_id in annotations if isinstance(category_id, int)}
    for root in categories:
        others = [one for one in categories if one is not root]
        if (
            root.get("supercategory") == "none"
            and isinstance(root["id"], int)
            and root["id"] not in used
            and all(one.get("supercategory") == root["name"] for one in others)
        ):
            return others
    return categories


def _parse(path: Path) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]], list[dict[str, Any]]]:
    """Return (id, file name) per image, (image id, category id) per annotation, and the categories."""
    try:
        content = json.loads(path.read_bytes(), object_hook=_slim)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}): fetch the annotation file again") from error
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        found = ", ".join(content) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(
            f"{str(path)!r} contains {found}: expected an object with the lists images, annotations and categories"
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
    # Outlines fill most of the file: dropping each one as it is parsed keeps them out of memory.
    if "image_id" in entry and "category_id" in entry:
        return _Annotation((entry["image_id"], entry["category_id"]))
    if "file_name" in entry and "id" in entry:
        return _Image((entry["id"], entry["file_name"]))
    return entry


def _integers(values: Sequence[Any], what: str, path: Path) -> _Ids:
    wrong = [value for value in values if type(value) is not int or not -(2**63) <= value < 2**63]
    if wrong:
        raise ValueError(
            f"{str(path)!r} has {what} that are not integers, such as {wrong[0]!r}: "
            "expected integer ids of at most 64 bits"
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
    """Index in `ids`, which need not be sorted, of each value."""
    wanted = _integers(values, f"annotations of {what}", path)
    order = np.argsort(ids)
    found = order[np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)]
    unknown = wanted[ids[found] != wanted]
    if len(unknown):
        raise ValueError(
            f"{len(unknown)} annotations in {str(path)!r} have a {what} that the file does not list, "
            f"first {unknown[0]}: drop them or add the entries they refer to"
        )
    return np.asarray(found, dtype=np.int64)
