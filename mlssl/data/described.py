"""A set of images in one sentence: how many there are, which classes, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping

from mlssl.data.paths import count_extensions
from mlssl.data.records import Records

NUM_NAMED = 5
"""Classes that are named from each end of the frequencies."""


def describe(records: Records) -> str:
    """Images by extension, those left out, classes, labels per image, and the most and least frequent classes.

    >>> describe(Records(["a.jpg", "b.png"], [[1, 0], [1, 1]], ["sky", "sea"]))
    '2 images (1 .jpg, 1 .png), 2 classes, 1.5 labels per image; most frequent: sky 2, sea 1'
    """
    by_extension = count_extensions(records.path(index).name for index in range(len(records)))
    kinds = f" ({_listed(by_extension)})" if set(by_extension) != {""} else ""
    left_out = f", left out {_listed(records.left_out)}" if records.left_out else ""
    said = f"{len(records)} images{kinds}{left_out}"
    if records.labels is None:
        return f"{said}, unlabelled"
    present = (records.labels == 1).sum(axis=0)
    order = sorted(range(len(records.classes)), key=lambda column: -present[column])
    counts = [f"{records.classes[column]} {present[column]}" for column in order]
    least = counts[NUM_NAMED:][-NUM_NAMED:]
    return (
        f"{said}, {len(order)} classes, {present.sum() / len(records):.1f} labels per image; "
        f"most frequent: {', '.join(counts[:NUM_NAMED])}" + (f"; least frequent: {', '.join(least)}" if least else "")
    )


def remarks(records: Records) -> list[str]:
    """Name the classes that cannot be scored on a set, because every image of it shows them or none does.

    >>> remarks(Records(["a.jpg", "b.png"], [[1, 0, 0], [1, 0, 1]], ["sky", "sea", "sun"]))
    ['1 of 3 classes are absent from no image, no mAP: sky', '1 of 3 classes are shown by no image, no mAP: sea']
    """
    if records.labels is None:
        return []
    found = []
    for value, what in ((0, "classes are absent from no image, no mAP"), (1, "classes are shown by no image, no mAP")):
        there = (records.labels == value).any(axis=0)
        names = [one for one, is_there in zip(records.classes, there, strict=True) if not is_there]
        if names:
            listed = f"{', '.join(names[:NUM_NAMED])}{', …' if len(names) > NUM_NAMED else ''}"
            found.append(f"{len(names)} of {len(records.classes)} {what}: {listed}")
    return found


def _listed(by_extension: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {kind or 'without extension'}" for kind, number in by_extension.items())
