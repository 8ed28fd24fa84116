"""Derive sets from other sets: join roots, select classes, hold out a fraction."""

from __future__ import annotations

import difflib
import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mlssl.data.records import OTHER_CLASSES, Records
from mlssl.data.set_checks import how_classes_differ


def joined(sets: Sequence[Records], sources: Sequence[str]) -> Records:
    """Join sets with the same classes, or without labels.

    Args:
        sets: At least one set; all images are files decoded by the same function.
        sources: Origin of each set, for errors.

    Returns:
        All images in order, with paths relative to their common folder. Ids are kept if they are unique; otherwise they
        are 0 … n − 1.

    Raises:
        ValueError: The sets have different classes, only some have labels, or two contain the same image.
    """
    if len(sets) == 1:
        return sets[0]
    first = sets[0]
    for records, source in zip(sets, sources, strict=True):
        if (records.labels is None) != (first.labels is None):
            raise ValueError(
                f"only one of {sources[0]!r} and {source!r} is labelled: label both, or pass the labelled one as probe "
                "(--data.probe.root)"
            )
        if records.classes != first.classes:
            differ = how_classes_differ(repr(sources[0]), first, repr(source), records)
            raise ValueError(
                f"{differ}: use the same classes, or select those that both have, classes=[…] (--data.classes '[…]')"
            )
    paths: list[str] = []
    owner: dict[str, str] = {}
    for records, source in zip(sets, sources, strict=True):
        for path in _paths(records):
            if path in owner:
                raise ValueError(f"{owner[path]!r} and {source!r} both contain the image {path!r}: leave it out of one")
            owner[path] = source
            paths.append(path)
    root = os.path.commonpath([os.path.split(path)[0] for path in paths])
    ids = np.concatenate([records.image_ids for records in sets])
    left_out = Counter[str]()
    for records in sets:
        left_out.update(records.left_out)
    return Records(
        [os.path.relpath(path, root) for path in paths],
        None if first.labels is None else np.concatenate([records.labels for records in sets]),
        first.classes,
        image_ids=ids if len(np.unique(ids)) == len(ids) else None,
        root=root,
        decode=first.decode,
        channels=first.channels,
        left_out=left_out,
    )


def with_classes_named(records: Records, classes: Sequence[str], source: str) -> Records:
    """Select classes by name, in the given order, and count the labels of other classes as left out.

    Raises:
        ValueError: A class is unknown, or the set has no labels.
    """
    if records.labels is None:
        raise ValueError(f"classes={list(classes)} were given, and {source!r} has no labels: leave classes out")
    column_of = {unicodedata.normalize("NFC", name): column for column, name in enumerate(records.classes)}
    for name in classes:
        if unicodedata.normalize("NFC", name) not in column_of:
            near = difflib.get_close_matches(name, records.classes, n=1)
            raise ValueError(
                f"{source!r} has no class {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}: it has "
                f"{', '.join(records.classes[:10])}{', …' if len(records.classes) > 10 else ''}"
            )
    columns = [column_of[unicodedata.normalize("NFC", name)] for name in classes]
    kept = records.with_classes(columns)
    others = int((records.labels == 1).sum()) - int((records.labels[:, columns] == 1).sum())
    kept.left_out = dict(Counter(records.left_out) + Counter({OTHER_CLASSES: others}))
    return kept


def held_out(records: Records, fraction: float) -> tuple[Records, Records]:
    """Hold out a fraction of the images, always the same ones: the paths with the smallest hashes.

    The order of two images does not depend on other images, the seed or the machine, so a training run and a later
    evaluation hold out the same images.

    Args:
        records: At least two.
        fraction: In (0, 1); the number of images is rounded.

    Returns:
        The remaining records, and the held-out ones.

    Raises:
        ValueError: One of the two would be empty.
    """
    names = [
        path if records.root is None else path.relative_to(records.root)
        for path in map(records.path, range(len(records)))
    ]
    count = round(fraction * len(records))
    if not 0 < count < len(records):
        raise ValueError(
            f"val_fraction={fraction} of {len(records)} images leaves {count} for validation and "
            f"{len(records) - count} for training: pass a fraction that leaves images for both"
        )
    order = sorted(range(len(records)), key=lambda row: hashlib.sha256(os.fsencode(names[row].as_posix())).digest())
    is_out = np.zeros(len(records), dtype=bool)
    is_out[order[:count]] = True
    return records.subset(~is_out), records.subset(is_out)


def _paths(records: Records) -> list[str]:
    """Absolute paths; symbolic links are resolved in the root only."""
    root = None if records.root is None else os.path.realpath(records.root)
    rows = map(records.path, range(len(records)))
    if root is None:
        return [os.path.realpath(path) for path in rows]
    assert records.root is not None
    return [os.path.normpath(f"{root}/{path.relative_to(records.root).as_posix()}") for path in rows]
