"""Corel-5K: 4,500 training and 499 test photographs of 192 × 128 pixels with 1–5 of 374 words each.

P. Duygulu et al., "Object Recognition as Machine Translation", ECCV 2002. Expected layout:

    root/labels/words             one word per line; the line number, from 1, is its label
    root/labels/training_label    image number, then the numbers of its words
    root/labels/test_label
    root/train_jpeg/<number>.jpeg
    root/test_jpeg/<number>.jpeg
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from mlssl.data.paths import check_files
from mlssl.data.records import Records, check_class_names

SPLITS = {"train": ("training_label", "train_jpeg"), "test": ("test_label", "test_jpeg")}


def read_corel5k(root: str | os.PathLike[str], split: str = "train") -> Records:
    """Read a split of Corel-5K: all 374 words are classes, the image numbers are the ids.

    Args:
        root: Folder with `labels`, `train_jpeg` and `test_jpeg`.
        split: "train" or "test".

    Returns:
        Images in the order of the label file. An image without a word has a row of zeros, a word without an image in
        this split a column of zeros; see `frequent_labels`.

    Raises:
        FileNotFoundError: The folder, a label file or a listed image is missing.
        ValueError: The split is unknown, a word is empty or repeated, or a label file is malformed.
    """
    folder = Path(root)
    if split not in SPLITS:
        raise ValueError(f"Corel-5K has no split {split!r}: use 'train' or 'test'")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {str(folder)!r}: pass as root the folder with Corel-5K's labels/, train_jpeg/ and test_jpeg/"
        )
    label_file, image_folder = SPLITS[split]
    words = _lines(folder / "labels" / "words")
    check_class_names(words, folder / "labels" / "words")
    label_path = folder / "labels" / label_file
    lines = _lines(label_path)
    labels = np.zeros((len(lines), len(words)), dtype=np.int8)
    numbers = np.zeros(len(lines), dtype=np.int64)
    seen: set[int] = set()
    for row, line in enumerate(lines):
        try:
            number, *present = map(int, line.split())
        except ValueError as error:
            raise ValueError(
                f"line {row + 1} of {str(label_path)!r} is {line!r}: "
                "expected an image number and the numbers of its words"
            ) from error
        if present and not 1 <= min(present) <= max(present) <= len(words):
            raise ValueError(
                f"line {row + 1} of {str(label_path)!r} names the words {present}: "
                f"expected line numbers of labels/words, 1 to {len(words)}"
            )
        if not 0 <= number < 2**63:
            raise ValueError(
                f"line {row + 1} of {str(label_path)!r} begins with {number}: expected the number of an image"
            )
        if number in seen:
            raise ValueError(f"line {row + 1} of {str(label_path)!r} repeats image {number}: keep one of its lines")
        seen.add(number)
        numbers[row] = number
        labels[row, np.array(present, dtype=np.int64) - 1] = 1
    names = [f"{number}.jpeg" for number in numbers]
    files = check_files(folder / image_folder, names, label_path)
    return Records(files.names, labels, words, image_ids=numbers, root=folder / image_folder, left_out=files.left_out)


def frequent_labels(train: Records, test: Records, min_train: int = 40, min_test: int = 4) -> list[int]:
    """Select classes frequent enough to be scored; pass them to `Records.with_classes` of both sets.

    Args:
        train: Labelled records.
        test: Labelled records of the same classes.
        min_train: Minimum number of training images per class. With 40 and 4, Corel-5K keeps 81 of 374 words.
        min_test: Minimum number of test images per class.

    Returns:
        Columns of `labels`, ascending; empty if no class is frequent enough.

    Raises:
        ValueError: Records are unlabelled, or their classes differ.
    """
    if train.labels is None or test.labels is None or train.classes != test.classes:
        raise ValueError(
            f"{train!r} and {test!r} do not share their classes: pass labelled records of two splits of one data set"
        )
    enough = ((train.labels == 1).sum(axis=0) >= min_train) & ((test.labels == 1).sum(axis=0) >= min_test)
    return [int(column) for column in np.flatnonzero(enough)]


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {str(path)!r}: Corel-5K's root needs labels/words and labels/{{training,test}}_label"
        )
    try:
        text = path.read_text(encoding="utf-8").rstrip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text ({error}): fetch Corel-5K's label files again") from error
    if not text:
        raise ValueError(f"{str(path)!r} is empty: fetch Corel-5K's label files again")
    return [line.strip() for line in text.splitlines()]
