"""Locations and formats of sets: one list of options for the data module and every command."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlssl.commands.evaluation_options import EvaluationOptions
from mlssl.commands.parsing import command_parser
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.formats import read_sets
from mlssl.data.joined import held_out, joined, with_classes_named
from mlssl.data.option_checks import check_options
from mlssl.data.records import Records
from mlssl.data.set_options import SetOptions, SplitOptions, plain_options, with_folder

TASK = {"data": {"image": "photos/1.jpg"}, "annotations": [{"result": [{"value": {"choices": ["cup", "sky"]}}]}]}
CVAT = (
    '<annotations><image name="1.jpg" subset="a"><tag label="cup"/></image>'
    '<image name="2.jpg" subset="b"/></annotations>'
)


def coco(path: Path, categories: list[str], shown: list[list[str]], start: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "images": [{"id": start + row, "file_name": f"{start + row}.jpg"} for row in range(len(shown))],
        "categories": [{"id": index, "name": name} for index, name in enumerate(categories)],
        "annotations": [
            {"image_id": start + row, "category_id": categories.index(name)}
            for row, names in enumerate(shown)
            for name in names
        ],
    }
    path.write_text(json.dumps(content))


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight images, and files of every kind about them; the current directory."""
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "more/north", "more/south"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(1, 9):
            (tmp_path / folder / f"{number}.jpg").touch()
    coco(tmp_path / "train.json", ["sky", "cup"], [["cup"], ["sky", "cup"], []])
    coco(tmp_path / "val.json", ["cup", "sky"], [["cup"], ["sky"]], start=5)
    (tmp_path / "tasks.json").write_text("\ufeff" + json.dumps([TASK]), encoding="utf-8")
    (tmp_path / "cvat.xml").write_text(CVAT, encoding="utf-16")
    (tmp_path / "list.csv").write_text("path,labels\n1.jpg,cup;sky\n2.jpg,sky\n3.jpg,\n4.jpg,cup\n")
    for name, labels in (("north", ["cup", "sky"]), ("south", ["cup", "sea"])):
        rows = [f"{row + 1}.jpg,{label}" for row, label in enumerate(labels)]
        (tmp_path / "more" / name / "train.csv").write_text("\n".join(["path,labels", *rows]) + "\n")
    return tmp_path


def read(**options: Any) -> tuple[Records, Records | None]:
    chosen = plain_options(**options)
    check_options(chosen)
    train, val, probe = read_sets(chosen)
    assert probe is None
    return train, val


def labels(records: Records | None) -> list[list[int]]:
    assert records is not None
    return np.asarray(records.labels).tolist()


# ---------------------------------------------------------------------- one list of options


def test_the_data_module_takes_the_options_of_the_commands() -> None:
    parameters = inspect.signature(MultiLabelDataModule).parameters
    for field in fields(SplitOptions):
        assert field.name in parameters, field.name
        assert field.default is None
        assert parameters[field.name].default in (None, "synthetic")
        assert re.search(rf"^        {field.name}: ", MultiLabelDataModule.__doc__ or "", re.MULTILINE), field.name
    assert issubclass(EvaluationOptions, SplitOptions)


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("linear", SplitOptions),
        ("knn", SplitOptions),
        ("pack", SplitOptions),
        ("neighbors", SetOptions),
        ("predict", SetOptions),
        ("tag", SetOptions),
    ],
)
def test_commands_accept_and_explain_them(command: str, kind: Any) -> None:
    briefly, fully = (command_parser(command, all_options=every).format_help() for every in (False, True))
    for field in fields(kind):
        assert f"--{field.name}" in briefly or field.name == "root"
        assert re.search(rf"^  (--)?{field.name} ", fully, re.MULTILINE), field.name


# ---------------------------------------------------------------------- annotation files


@pytest.mark.parametrize(
    ("options", "classes", "expected"),
    [
        ({"annotations": "train.json", "images": "photos"}, ("sky", "cup"), [[0, 1], [1, 1], [0, 0]]),
        ({"annotations": "tasks.json"}, ("cup", "sky"), [[1, 1]]),
        ({"annotations": "cvat.xml", "images": "photos"}, ("cup",), [[1], [0]]),
        ({"annotations": "cvat.xml", "images": "photos", "train_split": "b", "classes": ["cup"]}, ("cup",), [[0]]),
        (
            {"annotations": "list.csv", "images": "photos", "separator": ";"},
            ("cup", "sky"),
            [[1, 1], [0, 1], [0, 0], [1, 0]],
        ),
        (
            {"annotations": "list.csv", "images": "photos", "separator": ";", "absent": 0},
            ("cup", "sky"),
            [[1, 1], [0, 1], [-1, -1], [1, 0]],
        ),
        ({"annotations": ["train.json"], "images": "photos", "classes": ["cup"]}, ("cup",), [[1], [1], [0]]),
    ],
)
def test_the_format_of_annotations_is_detected_from_their_content(
    sets: Path, options: Any, classes: Any, expected: Any
) -> None:
    train, val = read(**options)
    assert (train.classes, labels(train), val) == (classes, expected, None)


def test_val_is_another_file_a_subset_or_held_out(sets: Path) -> None:
    both = {"annotations": "train.json", "images": "photos"}
    train, val = read(**both, val_annotations="val.json")
    assert train.classes == ("sky", "cup")
    assert labels(val) == [[0, 1], [1, 0]]  # in the order of the training set
    train, val = read(annotations="cvat.xml", images="photos", train_split="a", val_split="b")
    assert (labels(train), labels(val)) == ([[1]], [[0]])
    train, val = read(**both, val_fraction=0.34)
    assert val is not None
    assert (len(train), len(val)) == (2, 1)
    assert {*train.image_ids, *val.image_ids} == {1, 2, 3}
    with pytest.raises(
        ValueError, match=r"a split \('b'\) was given, .* COCO's JSON: pass val_annotations or val_fraction"
    ):
        read(**both, val_split="b")
    _, val = read(**both, val_annotations="val.json", val_images="more/north")
    assert val is not None
    assert val.path(0) == Path("more/north/5.jpg")


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (
            {"annotations": "gone.json"},
            FileNotFoundError,
            "annotations 'gone.json' does not exist: pass a COCO, Label Studio",
        ),
        (
            {"annotations": "photos"},
            FileNotFoundError,
            "annotations 'photos' is a folder: .* or root for a folder",
        ),
        (
            {"annotations": "photos/1.jpg"},
            ValueError,
            "'photos/1.jpg' begins with '': expected COCO or Label Studio JSON",
        ),
        (
            {"annotations": "tasks.json", "dataset": "coco"},
            ValueError,
            "dataset='coco' was given, and 'tasks.json' is Label",
        ),
        (
            {"annotations": "train.json", "absent": -1},
            ValueError,
            r"absent \(-1\) was given, which does not apply to 'train.json', COCO",
        ),
        (
            {"annotations": "cvat.xml", "root": "photos"},
            ValueError,
            r"root and annotations were given: .* \(--data.images\)",
        ),
        (
            {"annotations": "cvat.xml", "dataset": "voc"},
            ValueError,
            "annotations and dataset='voc' were given: the format is read from the file",
        ),
        ({"images": "photos"}, ValueError, "images='photos' was given without annotations"),
        ({"val_annotations": "val.json"}, ValueError, "val_annotations='val.json' was given without annotations"),
        (
            {"annotations": "train.json", "val_images": "a"},
            ValueError,
            "val_images='a' was given without val_annotations",
        ),
        ({"val_fraction": 1.0}, ValueError, "val_fraction=1.0 was given: pass a fraction between 0 and 1"),
        (
            {"val_fraction": 0.2, "val_split": ""},
            ValueError,
            "val_split and val_fraction were given: each defines the validation set",
        ),
        ({"classes": []}, ValueError, r"classes=\[\] was given: pass at least one name"),
        ({"classes": ["a", "a"]}, ValueError, "classes 0 and 1 are both named 'a'"),
        (
            {"dataset": "folder", "root": "photos", "classes": ["a"]},
            ValueError,
            "a folder has no labels, leave classes out",
        ),
        (
            {"dataset": "shards", "root": ["a", "b"]},
            ValueError,
            r"root=\['a', 'b'\] has several folders, and shards take one",
        ),
    ],
)
def test_refuses_conflicting_options(sets: Path, options: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        read(**options)


def test_refuses_an_unknown_option() -> None:
    with pytest.raises(ValueError, match="a set has no option 'clases', did you mean 'classes': leave it out"):
        plain_options(clases=["a"])
    with pytest.raises(
        ValueError, match=r"'photos' and images='x' were given: with annotations, pass one image folder"
    ):
        with_folder(SetOptions(annotations="a.json", images="x"), "photos")
    assert with_folder(SetOptions(annotations="a.json"), "photos").images == "photos"
    assert with_folder(SetOptions(), ["a", "b"]).dataset == "folder"


# ---------------------------------------------------------------------- classes


def test_classes_are_kept_by_name_in_any_format_and_others_counted(sets: Path) -> None:
    train, _ = read(annotations="train.json", images="photos", classes=["cup"])
    assert (train.classes, train.left_out["labels of other classes"]) == (("cup",), 1)
    with pytest.raises(ValueError, match=r"'train.json' has no class 'cop' \(did you mean 'cup'\?\): it has sky, cup"):
        read(annotations="train.json", images="photos", classes=["cop"])
    train, _ = read(annotations="tasks.json", classes=["sky", "fog"])
    assert (train.classes, labels(train), train.left_out["labels of other classes"]) == (("sky", "fog"), [[1, 0]], 1)
    with pytest.raises(ValueError, match=r"classes=\['a'\] were given, and 'x' has no labels: leave classes out"):
        with_classes_named(Records(["1.jpg"]), ["a"], "x")
    Path("plain.csv").write_text("path\n1.jpg\n")
    with pytest.raises(
        ValueError, match=r"classes=\['a'\] were given, and 'plain.csv' has no labels: leave classes out"
    ):
        read(annotations="plain.csv", images="photos", classes=["a"])


# ---------------------------------------------------------------------- several roots


def test_several_roots_are_one_set(sets: Path) -> None:
    roots = ["more/north", "more/south/"]
    train, val = read(dataset="manifest", root=roots, val_split="")
    assert (train.classes, labels(train)) == (("cup", "sea", "sky"), [[1, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]])
    assert val is None
    assert train.path(3) == sets / "more" / "south" / "2.jpg"
    assert train.image_ids.tolist() == [0, 1, 2, 3]
    photos, _ = read(dataset="folder", root=roots)
    assert (len(photos), photos.left_out) == (16, {".csv": 2})
    listed, _ = read(annotations=["train.json", "val.json"], images="photos")
    assert listed.image_ids.tolist() == [1, 2, 3, 5, 6]
    with pytest.raises(
        ValueError, match=r"'more' and 'more/south' both contain the image '.*more/south/1.jpg': leave it out"
    ):
        read(dataset="folder", root=["more", "more/south"])
    coco(sets / "other.json", ["cup", "fog"], [["cup"]], start=7)
    with pytest.raises(
        ValueError, match=r"'train.json' has 2 classes and 'other.json' has 2 \(only in one of them: fog, sky\)"
    ):
        read(annotations=["train.json", "other.json"], images="photos")
    both, _ = read(annotations=["train.json", "other.json"], images="photos", classes=["cup"])
    assert labels(both) == [[1], [1], [0], [1]]


def test_refuses_to_join_labelled_and_unlabelled_sets() -> None:
    labelled = Records(["a.jpg"], [[1]], ["cup"])
    with pytest.raises(ValueError, match=r"only one of 'x' and 'y' is labelled: label both, or pass .*probe"):
        joined([labelled, Records(["b.jpg"])], ["x", "y"])


# ---------------------------------------------------------------------- held out, and a set for the probe


def test_the_held_out_images_depend_only_on_their_paths() -> None:
    names = [f"{number}.jpg" for number in range(40)]
    _, val = held_out(Records(names, root="/a"), 0.25)
    _, same = held_out(Records(names[::-1], root="/elsewhere"), 0.25)
    kept = {val.path(row).name for row in range(len(val))}
    assert (len(val), kept) == (10, {same.path(row).name for row in range(len(same))})
    train, fewer = held_out(Records(names[:20], root="/a"), 0.25)
    assert len(train) + len(fewer) == 20
    for fraction, left in ((0.01, "0 for validation and 40"), (0.99, "40 for validation and 0")):
        with pytest.raises(ValueError, match=rf"val_fraction={fraction} of 40 images leaves {left}"):
            held_out(Records(names), fraction)


def test_an_unlabelled_set_is_trained_on_with_a_labelled_one_for_the_probe(sets: Path) -> None:
    options = {"annotations": "train.json", "images": "photos", "val_annotations": "val.json"}
    for probe in (options, SplitOptions(**options)):  # type: ignore[arg-type]
        data = MultiLabelDataModule("folder", "more", probe=probe)
        data.setup()
        assert data.hparams["probe"] == options
        assert data.train_records is not None
        assert data.probe_records is not None
        assert (len(data.train_records), len(data.probe_records)) == (16, 3)
        assert (data.train_records.labels, labels(data.val_records)) == (None, [[0, 1], [1, 0]])


@pytest.mark.parametrize(
    ("options", "probe", "sentence"),
    [
        ({}, {}, r"probe does not name a set: pass dataset and root, or annotations \(--data.probe.dataset coco\)"),
        ({}, {"dataset": "folder", "root": "photos"}, "probe is a folder, which has no labels"),
        (
            {"val_split": "val"},
            {"annotations": "train.json"},
            "val_split and probe were given: .* pass it as probe.val_split",
        ),
        (
            {"val_fraction": 0.1},
            {"annotations": "train.json"},
            "val_fraction and probe were given: .* probe.val_fraction",
        ),
        (
            {},
            {"annotations": "train.json", "images": "photos"},
            r"or hold some out, .*\(--data.probe.val_fraction 0.2\)",
        ),
    ],
)
def test_refuses_uninformative_sets_for_the_probe(sets: Path, options: Any, probe: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MultiLabelDataModule("folder", "photos", probe=probe, **options).setup()
