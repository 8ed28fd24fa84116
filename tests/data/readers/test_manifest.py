"""A list of images and labels, in CSV or JSON Lines: read correctly, or refused with line and name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.described import describe
from mlssl.data.readers.corel5k import read_corel5k
from mlssl.data.readers.manifest import read_manifest

CSV = "path,labels,unknown\na/1.png,sky|sea,\nb/2.png,,sky\n3.png, sun ,\n"
LINES: list[dict[str, Any]] = [
    {"path": "a/1.png", "labels": ["sky", "sea"]},
    {"path": "b/2.png", "labels": [], "unknown": ["sky"]},
    {"path": "3.png", "labels": ["sun"]},
]
LABELS = [[1, 1, 0], [0, -1, 0], [0, 0, 1]]  # sea, sky, sun


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for index, name in enumerate(("a/1.png", "b/2.png", "3.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6), (index, 0, 0)).save(tmp_path / name)
    return tmp_path


def write(folder: Path, text: str, name: str = "train.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def json_lines(*entries: Any) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.csv", CSV),
        ("train.csv", "\ufeff" + CSV.replace("\n", "\r\n")),  # as spreadsheets save it
        ("train.jsonl", json_lines(*LINES)),
        ("train.ndjson", json_lines(*LINES).replace("\n", "\n\n")),
    ],
    ids=["csv", "csv of a spreadsheet", "jsonl", "ndjson"],
)
def test_reads_paths_labels_and_unknown_labels(photos: Path, name: str, text: str) -> None:
    records = read_manifest(write(photos, text, name))
    assert records.labels is not None
    assert (records.classes, records.labels.tolist()) == (("sea", "sky", "sun"), LABELS)
    assert [int(records.image(index)[0, 0, 0]) for index in range(3)] == [0, 1, 2]


def test_classes_can_be_given_in_order(photos: Path) -> None:
    records = read_manifest(write(photos, CSV), ["sun", "fog", "sea", "sky"])
    assert records.labels is not None
    assert records.labels.tolist() == [[0, 0, 1, 1], [0, 0, 0, -1], [1, 0, 0, 0]]


@pytest.mark.parametrize("text", ["path\n3.png\n", None])
def test_without_labels_the_images_are_unlabelled(photos: Path, text: str | None) -> None:
    name = "a.csv" if text else "a.jsonl"
    assert read_manifest(write(photos, text or json_lines({"path": "3.png"}), name)).labels is None


def test_the_list_may_be_in_another_folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.mktemp("lists"), CSV)
    assert read_manifest(path, root=photos).image(2).shape == (6, 8, 3)


def test_images_can_be_read_by_a_custom_function(photos: Path) -> None:
    def bands(path: Path) -> np.ndarray:
        return np.full((4, 5, 7), len(path.name), np.uint8)

    assert read_manifest(write(photos, CSV), decode=bands, channels=7).image(0).shape == (4, 5, 7)


def test_val_always_has_the_classes_of_train(photos: Path) -> None:
    write(photos, CSV)
    write(photos, "path,labels\n3.png,sun\n", "val.csv")
    data = MultiLabelDataModule("manifest", photos, batch_size=2, size=16, num_workers=0)
    data.setup()
    assert data.val_records is not None
    assert data.val_records.labels is not None
    assert data.val_records.labels.tolist() == [[0, 0, 1]]
    write(photos, "path,labels\n3.png,sunn\n", "val.csv")
    with pytest.raises(
        ValueError,
        match=r"has the label 'sunn' \(did you mean 'sun'\?\), which is not one of the 3 classes: correct it",
    ):
        MultiLabelDataModule("manifest", photos).setup()


WRONG: list[tuple[str, str, str]] = [
    ("a.csv", "path,lables\n3.png,sun\n", "header of .*a.csv' has the column 'lables' .did you mean 'labels'"),
    (
        "a.csv",
        "path,labels,weather\n3.png,sun,wet\n",
        "has the column 'weather': expected only path, labels and unknown",
    ),
    ("a.csv", "labels\nsun\n", "the header of .* has no path"),
    ("a.csv", "", "the header of .* has no path"),
    ("a.csv", "path,labels\n", "lists no image: write one line per image"),
    ("a.csv", "path,labels\n3.png\n", "line 2 of .* does not have the 2 fields of the header"),
    ("a.csv", "path,labels\n3.png,a,b\n", "line 2 of .* does not have the 2 fields of the header"),
    ("a.csv", 'path,labels\n"3.png,sun\n', "is not CSV in UTF-8"),
    ("a.csv", "path,labels\n3.png,\n", "has a label field but no labels"),
    ("a.csv", "path,labels\n3.png,a\n3.png,b\n", "line 3 of .* repeats '3.png' of line 2: keep one"),
    ("a.csv", "path,labels\n../3.png,a\n", "names the image '../3.png': expected a path inside the image folder"),
    ("a.csv", "path,labels\n/etc/3.png,a\n", "names the image '/etc/3.png'"),
    ("a.csv", "path,labels\n,a\n", "names the image ''"),
    ("a.csv", "path,labels,unknown\n3.png,a,a\n", "line 2 of .* has 'a' as a label and as unknown: keep one"),
    ("a.jsonl", "{path}\n", "line 1 of .* is not JSON .*: write one object per line"),
    ("a.jsonl", "[1]\n", "line 1 of .* is a list: write an object"),
    ("a.jsonl", '{"path": "3.png", "label": []}\n', "line 1 of .* has the column 'label' .did you mean 'labels'"),
    ("a.jsonl", '{"labels": []}\n', "line 1 of .* has no path"),
    ("a.jsonl", '{"path": "3.png", "labels": "sun"}\n', "line 1 of .* has labels 'sun': write a list of names"),
    ("a.jsonl", '{"path": 3, "labels": ["sun"]}\n', "names the image 3: expected a path"),
]


@pytest.mark.parametrize(("name", "text", "sentence"), WRONG)
def test_errors_name_the_line_and_the_name(photos: Path, name: str, text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_manifest(write(photos, text, name))


def test_binary_content_is_refused(photos: Path) -> None:
    (photos / "a.csv").write_bytes(b"path,labels\n\xff\xfe.png,a\n")
    with pytest.raises(ValueError, match="is not CSV in UTF-8"):
        read_manifest(photos / "a.csv")


def test_missing_files_are_named(photos: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no manifest '.*none.csv': pass a .csv or .jsonl file"):
        read_manifest(photos / "none.csv")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images listed in '.*train.csv' are not .*first b/9.png"):
        read_manifest(write(photos, "path\n3.png\nb/9.png\n"))


def test_a_list_of_real_photographs_equals_their_own_annotations(corel5k: Path, tmp_path: Path) -> None:
    expected = read_corel5k(corel5k, "test")
    assert expected.labels is not None
    lines = [
        {
            "path": expected.path(index).name,
            "labels": [expected.classes[column] for column in np.flatnonzero(expected.labels[index])],
        }
        for index in range(len(expected))
    ]
    path = write(tmp_path, json_lines(*lines), "test.jsonl")
    records = read_manifest(path, expected.classes, root=corel5k / "test_jpeg")
    assert np.array_equal(records.labels, expected.labels)
    assert np.array_equal(records.image(7), expected.image(7))


@pytest.mark.parametrize(
    ("name", "text", "settings"),
    [
        ("a.jsonl", json_lines(LINES[0], {"path": "b/2.png", "labels": None}, {"path": "3.png", "labels": []}), {}),
        ("a.jsonl", json_lines(LINES[0], {"path": "b/2.png"}, {"path": "3.png", "labels": []}), {}),
        ("a.csv", "path,labels,unknown\na/1.png,sky|sea,\nb/2.png,,\n3.png,,sea|sky\n", {"absent": 0}),
    ],
)
def test_unlabelled_images_are_unknown(photos: Path, name: str, text: str, settings: dict[str, Any]) -> None:
    records = read_manifest(write(photos, text, name), **settings)
    assert records.labels is not None
    last = [-1, -1] if settings else [0, 0]
    assert (records.classes, records.labels.tolist()) == (("sea", "sky"), [[1, 1], [-1, -1], last])
    assert "1 of them unlabelled" in describe(records) or settings


def test_a_blank_field_of_names_means_no_class_by_default(photos: Path) -> None:
    records = read_manifest(write(photos, "path,labels\na/1.png,sky\nb/2.png,\n"))
    assert records.labels is not None
    assert records.labels.tolist() == [[1], [0]]
    assert "1 of them without any" in describe(records)


def test_labels_of_other_classes_are_left_out_and_counted_on_request(photos: Path) -> None:
    records = read_manifest(write(photos, CSV), ["fog", "sky"], leave_out_others=True)
    assert records.labels is not None
    assert (records.labels.tolist(), records.left_out) == ([[0, 1], [0, -1], [0, 0]], {"labels of other classes": 2})
    flags = write(photos, "path,sky,sea\na/1.png,1,1\nb/2.png,0,-1\n")
    records = read_manifest(flags, ["sky"], leave_out_others=True)
    assert records.labels is not None
    assert (records.labels.tolist(), records.left_out["labels of other classes"]) == ([[1], [0]], 1)
    with pytest.raises(ValueError, match=r"has 2 columns of classes for 1 classes \(only in one of them: fog\)"):
        read_manifest(flags, ["fog"], leave_out_others=True)
