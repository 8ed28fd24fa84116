"""Roboflow exports: COCO or one column per class, in the folder of each split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.readers.roboflow import read_roboflow


def coco(folder: Path, categories: list[tuple[int, str, str]], shown: list[list[int]]) -> None:
    folder.mkdir(parents=True)
    for index in range(len(shown)):
        (folder / f"{index}_jpg.rf.jpg").touch()
    content = {
        "images": [{"id": index, "file_name": f"{index}_jpg.rf.jpg"} for index in range(len(shown))],
        "categories": [{"id": key, "name": name, "supercategory": above} for key, name, above in categories],
        "annotations": [
            {"id": 0, "image_id": index, "category_id": key} for index, keys in enumerate(shown) for key in keys
        ],
    }
    (folder / "_annotations.coco.json").write_text(json.dumps(content))


def table(folder: Path, header: str, *rows: str) -> None:
    folder.mkdir(parents=True)
    for row in rows:
        (folder / row.split(",")[0]).touch()
    (folder / "_classes.csv").write_text("\n".join([header, *rows]) + "\n")


def test_reads_coco_without_the_root_category(tmp_path: Path) -> None:
    above = [(0, "cup", "none"), (1, "cup", "cup"), (2, "table", "cup")]
    coco(tmp_path / "train", above, [[1], [2, 1], []])
    records = read_roboflow(tmp_path)
    assert records.labels is not None
    assert (records.classes, records.labels.tolist()) == (("cup", "table"), [[1, 0], [1, 1], [0, 0]])
    coco(tmp_path / "valid", [*above, (3, "sky", "none")], [[0], [3]])  # one that is used, or not above all, stays
    with pytest.raises(ValueError, match="has two categories named 'cup'"):
        read_roboflow(tmp_path, "valid")


def test_reads_one_column_per_class_in_the_order_of_the_training_set(tmp_path: Path) -> None:
    table(tmp_path / "train", "filename, cup, table", "a.jpg, 1, 0", "b.jpg, 1, 1")
    table(tmp_path / "valid", "filename, table, cup", "c.jpg, 1, 0", "d.jpg, 0, 0")
    data = MultiLabelDataModule("roboflow", tmp_path, batch_size=2)
    data.setup()
    assert data.val_records is not None
    assert data.classes == ("cup", "table")
    assert np.asarray(data.val_records.labels).tolist() == [[0, 1], [0, 0]]
    # No validation folder means no validation set.
    for path in (tmp_path / "valid").iterdir():
        path.unlink()
    alone = MultiLabelDataModule("roboflow", tmp_path)
    alone.setup()
    assert alone.val_records is None


def test_refuses_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder '.*train': pass as root .* an existing split: none"):
        read_roboflow(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"no _annotations\.coco\.json and no _classes\.csv in '.*train': export"
    ):
        read_roboflow(tmp_path)
    table(tmp_path / "twice", "filename, cup", "a.jpg, 1", "a.jpg, 0")
    with pytest.raises(ValueError, match=r"line 3 of '.*_classes\.csv' repeats 'a\.jpg' of line 2: keep one of them"):
        read_roboflow(tmp_path, "twice")
    table(tmp_path / "empty", "filename, cup")
    with pytest.raises(ValueError, match=r"_classes\.csv' lists no image: export the data set again"):
        read_roboflow(tmp_path, "empty")
    (tmp_path / "empty" / "_annotations.coco.json").touch()
    with pytest.raises(ValueError, match=r"empty' has both _annotations\.coco\.json and _classes\.csv: keep the one"):
        read_roboflow(tmp_path, "empty")
