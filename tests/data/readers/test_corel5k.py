"""Corel-5K: the real data if available, a generated copy of its layout, and malformed files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlssl.data.readers.corel5k import frequent_labels, read_corel5k
from mlssl.data.records import Records

TRAINING = {1000: [1, 3], 1003: [2], 2001: []}
TEST = {5: [3]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three words, three training pictures and a test picture."""
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "words").write_text("sky\nsea\npolar bear\n")
    for split, name, entries in (("train", "training", TRAINING), ("test", "test", TEST)):
        lines = [" ".join(map(str, [number, *words])) + "  \n" for number, words in entries.items()]
        (tmp_path / "labels" / f"{name}_label").write_text("".join(lines))
        (tmp_path / f"{split}_jpeg").mkdir()
        for number in entries:
            Image.effect_noise((24, 16), 60).save(tmp_path / f"{split}_jpeg" / f"{number}.jpeg")
    return tmp_path


def test_real_data_have_4500_and_499_images_and_81_frequent_labels(corel5k: Path) -> None:
    train, test = read_corel5k(corel5k), read_corel5k(corel5k, "test")
    assert (len(train), len(test)) == (4500, 499)
    assert len(train.classes) == len(test.classes) == 374
    assert train.image(0).shape in ((128, 192, 3), (192, 128, 3))
    assert test.image(-1).dtype == np.uint8
    kept = frequent_labels(train, test)
    assert len(kept) == 81
    for records, least in ((train, 40), (test, 4)):
        labels = records.with_classes(kept).labels
        assert labels is not None
        assert labels.shape == (len(records), 81)
        assert labels.sum(axis=0).min() >= least
        assert records.labels is not None
        assert 3 < records.labels.sum(axis=1).mean() < 4  # words an image


def test_reads_words_numbers_and_images_in_file_order(root: Path) -> None:
    train = read_corel5k(root)
    assert train.classes == ("sky", "sea", "polar bear")
    assert train.image_ids.tolist() == [1000, 1003, 2001]
    assert train.labels is not None
    assert train.labels.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert train.path(1) == root / "train_jpeg" / "1003.jpeg"
    assert train.image(2).shape == (16, 24, 3)
    test = read_corel5k(str(root), "test")
    assert (test.path(0), test.classes) == (root / "test_jpeg" / "5.jpeg", train.classes)


def test_refuses_another_split(root: Path) -> None:
    with pytest.raises(ValueError, match="Corel-5K has no split 'val': use 'train' or 'test'"):
        read_corel5k(root, "val")


def test_names_missing_files(root: Path) -> None:
    (root / "train_jpeg" / "1003.jpeg").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of 3 images listed in '.*training_label' are not .*first 1003\.jpeg: put"
    ):
        read_corel5k(root)
    (root / "test_jpeg" / "5.jpeg").unlink()
    (root / "test_jpeg").rmdir()
    with pytest.raises(FileNotFoundError, match=r"no folder '.*test_jpeg': put the images of"):
        read_corel5k(root, "test")
    (root / "labels" / "words").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file '.*words': Corel-5K's root needs labels/words and"):
        read_corel5k(root)
    with pytest.raises(FileNotFoundError, match=r"no folder '.*gone': pass as root the folder with Corel-5K's labels/"):
        read_corel5k(root / "gone")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"'.*training_label' is empty: fetch Corel-5K's label files again"),
        ("1000 1\n1003 x\n", r"line 2 of '.*training_label' is '1003 x': expected an image number and the numbers"),
        ("1000 1\n\n1003 2\n", r"line 2 of '.*training_label' is '': expected an image number"),
        (
            "1000 1 4\n",
            r"line 1 of '.*training_label' names the words \[1, 4\]: expected line numbers of labels/words, 1 to 3",
        ),
        ("1000 1\n1001 2\n1000 2\n", r"line 3 of '.*training_label' repeats image 1000: keep one of its"),
        ("1000 0\n", r"names the words \[0\]: expected line numbers of labels/words, 1 to 3"),
    ],
)
def test_refuses_malformed_lines(root: Path, text: str, sentence: str) -> None:
    (root / "labels" / "training_label").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_corel5k(root)


def test_frequent_labels_counts_both_sets_and_leaves_unknown_out() -> None:
    train = Records(["a", "b"], [[1, 1, -1], [1, 0, 1]], ["x", "y", "z"])
    test = Records(["c"], [[1, 1, 1]], ["x", "y", "z"])
    assert frequent_labels(train, test, 1, 1) == [0, 1, 2]
    assert frequent_labels(train, test, 2, 1) == [0]
    assert frequent_labels(train, test, 1, 2) == []
    for other in (Records(["c"]), Records(["c"], [[1, 1]], ["x", "y"])):
        with pytest.raises(ValueError, match=r"do not share their classes: pass labelled records"):
            frequent_labels(train, other)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("sky\n\nsea\n", r"labels/words': class 1 has the name '': give each class a non-empty name"),
        ("sky\nsea\nsky\n", r"labels/words': classes 0 and 2 are both named 'sky': merge their columns"),
    ],
)
def test_empty_and_repeated_words_are_refused_with_their_file(tmp_path: Path, words: str, sentence: str) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "words").write_text(words)
    with pytest.raises(ValueError, match=sentence):
        read_corel5k(tmp_path)
