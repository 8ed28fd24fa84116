"""Describe a set in one sentence: number of images, classes, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping

from mlssl.data.paths import count_extensions
from mlssl.data.records import Records

NUM_NAMED = 5
"""Number of most and of least frequent classes named."""


def describe(records: Records) -> str:
    """Images by extension, images left out, classes, labels per image, and the most and least frequent classes.

    >>> describe(Records(["a.jpg", "b.png"], [[1, 0], [1, 1]], ["sky", "sea"]))
    '2 images (1 .jpg, 1 .png), 2 classes, 1.5 labels per image; most frequent: sky 2, sea 1'
    """
    by_extension = count_extensions(records.path(index).name for index in range(len(records)))
    kinds = f" ({_listed(by_extension)})" if set(by_extension) != {""} else ""
    left_out = f", left out {_listed(records.left_out)};" if records.left_out else ","
    start = f"{len(records)} images{kinds}{left_out}"
    if records.labels is None:
        return f"{start} unlabelled"
    present = (records.labels == 1).sum(axis=0)
    order = sorted(range(len(records.classes)), key=lambda column: -present[column])
    counts = [f"{records.classes[column]} {present[column]}" for column in order]
    least = counts[NUM_NAMED:][-NUM_NAMED:]
    unlabelled = int((records.labels == -1).all(axis=1).sum())
    without = int((records.labels != 1).all(axis=1).sum()) - unlabelled
    few = [
        f"{number} of them {what}" for number, what in ((unlabelled, "unlabelled"), (without, "without any")) if number
    ]
    return (
        f"{start} {len(order)} classes, {present.sum() / len(records):.1f} labels per image"
        f"{''.join(f', {one}' for one in few)}; "
        f"most frequent: {', '.join(counts[:NUM_NAMED])}" + (f"; least frequent: {', '.join(least)}" if least else "")
    )


def _listed(by_extension: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {kind or 'without extension'}" for kind, number in by_extension.items())
