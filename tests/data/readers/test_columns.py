"""Label columns in practice: other separators, one column per class, −1 for absent, other headers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import pytest

from mlssl.data.absent import absent_values
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.readers.manifest import read_manifest
from mlssl.data.readers.python_sets import read_dataset
from mlssl.data.records import Records

SHOWN = [{"road", "clear"}, {"agriculture", "road"}, {"water", "road"}, {"agriculture"}, {"clear", "water"}, {"road"}]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(6):
        (tmp_path / f"{number}.jpg").touch()
    return tmp_path


def joined(folder: Path, join: Any, header: str = "path,labels", name: str = "train.csv") -> Path:
    lines = [f'{number}.jpg,"{join(sorted(shown))}"' for number, shown in enumerate(SHOWN)]
    (folder / name).write_text("\n".join([header, *lines]) + "\n")
    return folder / name


def table(folder: Path, *lines: str, name: str = "train.csv") -> Path:
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def shown(records: Records, value: int = 1) -> list[set[str]]:
    assert records.labels is not None
    return [{records.classes[column] for column in np.flatnonzero(row == value)} for row in records.labels]


# ---------------------------------------------------------------------- names that are joined


@pytest.mark.parametrize("sign", [";", "; ", ",", ", ", " ", "  "])
def test_names_with_another_separator_are_refused_until_it_is_given(photos: Path, sign: str) -> None:
    path, separator = joined(photos, sign.join), sign.strip() or " "
    with pytest.raises(
        ValueError,
        match=rf"line 2 of .* has the label 'clear{sign}road': pass separator='{separator}' \(--data.separator "
        rf'"{separator}"\) if these are several classes, or separator=\'\|\' .* if it is the name of one',
    ):
        read_manifest(path)
    assert shown(read_manifest(path, separator=separator)) == SHOWN
    whole = read_manifest(path, separator="|")
    assert (len(whole.classes), shown(whole)[0]) == (6, {f"clear{sign}road"})
    data = MultiLabelDataModule("manifest", photos, val_split="", separator=separator)
    data.setup()
    assert data.classes == ("agriculture", "clear", "road", "water")


@pytest.mark.parametrize(
    "join",
    [
        "|".join,
        str,
        lambda names: str(names).replace(",", ""),  # numpy's
        lambda names: f"[{', '.join(names)}]",
        lambda names: str(names).replace("'", '""'),  # JSON's, quoted for CSV
    ],
    ids=["bars", "Python", "numpy", "without quotes", "JSON"],
)
def test_bars_and_lists_need_no_option(photos: Path, join: Any) -> None:
    assert shown(read_manifest(joined(photos, join))) == SHOWN


def test_a_malformed_list_is_reported_by_line(photos: Path) -> None:
    path = table(photos, "path,labels", "0.jpg,\"['a', 'b']\"", "1.jpg,\"['a', 'b]\"")
    with pytest.raises(ValueError, match=r"line 3 of .* has the labels .*: write a list as \['sky', 'sea'\], or sky"):
        read_manifest(path)


def test_names_of_several_words_are_kept_whole(photos: Path) -> None:
    for names in (["traffic light", "stop sign", "fire hydrant"], ["traffic light|stop sign", "traffic light", "sign"]):
        path = table(photos, "path,labels", *(f"{number}.jpg,{name}" for number, name in enumerate(names)))
        assert "traffic light" in read_manifest(path).classes


def test_val_may_contain_multi_word_names_of_train_classes(photos: Path) -> None:
    path = table(photos, "path,labels", "0.jpg,traffic light", "1.jpg,light", "2.jpg,traffic")
    classes = ["light", "traffic", "traffic light"]
    assert shown(read_manifest(path, classes)) == [{"traffic light"}, {"light"}, {"traffic"}]


# ---------------------------------------------------------------------- a column for each class


def test_columns_of_ones_and_zeros_are_classes(photos: Path) -> None:
    for one, zero in (("1", "0"), ("1.0", "0.0"), ("True", "False")):
        path = table(photos, "Image Index,sky,sea", f"0.jpg,{one},{zero}", f"1.jpg,-1,{one}", f"2.jpg,{zero},{zero}")
        records = read_manifest(path)
        assert records.labels is not None
        assert (records.classes, records.labels.tolist()) == (("sky", "sea"), [[1, 0], [-1, 1], [0, 0]])
    assert read_manifest(path, ["sea", "sky"]).classes == ("sea", "sky")
    with pytest.raises(ValueError, match=r"has 2 columns of classes for 2 classes \(only in one of them: sea, sun\)"):
        read_manifest(path, ["sun", "sky"])


CHEXPERT = [
    "Path,Sex,Age,No Finding,Edema,Fracture",
    "0.jpg,Male,61,1.0,,",
    "1.jpg,Female,70,,-1.0,1.0",
    "2.jpg,,5,0.0,1.0,",
]


def test_blanks_are_refused_until_defined_and_other_columns_are_left_out(photos: Path) -> None:
    path, columns = table(photos, *CHEXPERT), ["No Finding", "Edema", "Fracture"]
    with pytest.raises(
        ValueError,
        match=r"has the column 'Sex': expected only path.*, or pass the label columns, such as label_columns",
    ):
        read_manifest(path)
    with pytest.raises(
        ValueError,
        match=r"line 2 of .* is blank in the column 'Edema', .*: pass absent='blank' \(--data.absent blank\)",
    ):
        read_manifest(path, label_columns=columns)
    expected = {
        "blank": [[1, 0, 0], [0, -1, 1], [0, 1, 0]],
        0: [[1, -1, -1], [-1, -1, 1], [0, 1, -1]],
        -1: [[1, -1, -1], [-1, 0, 1], [0, 1, -1]],
        ("blank", -1): [[1, 0, 0], [0, 0, 1], [0, 1, 0]],
    }
    for absent, labels in expected.items():
        records = read_manifest(path, label_columns=columns, absent=absent)  # type: ignore[arg-type]
        assert records.labels is not None
        assert records.labels.tolist() == labels
    with pytest.raises(ValueError, match=r"line 2 of .* has 'Male' in the column 'Sex': expected 1, 0 or -1"):
        read_manifest(path, label_columns=["Sex", "Edema"])


def test_signed_labels_are_refused_until_their_meaning_is_given(photos: Path) -> None:
    table(photos, "path,a,b", *(f"{number}.jpg,{1 - number % 2 * 2},-1" for number in range(6)))
    with pytest.raises(
        ValueError, match=r"The labels of train are 1 and -1 and never 0, .*: pass absent=-1 \(--data.absent -1"
    ):
        MultiLabelDataModule("manifest", photos, val_split="").setup()
    data = MultiLabelDataModule("manifest", photos, val_split="", absent=-1)
    data.setup()
    assert data.train_records is not None
    assert data.train_records.labels is not None
    assert set(data.train_records.labels.ravel().tolist()) == {0, 1}


def test_signed_labels_in_python_are_refused_until_their_meaning_is_given() -> None:
    draws = np.random.default_rng(0)
    items = [(np.zeros((40, 40, 3), np.uint8), np.where(draws.random(3) < 0.4, 1, -1)) for _ in range(8)]
    signed, pixels = read_dataset(items, ["a", "b", "c"], target_kind="multi_hot"), items[0][0]
    with pytest.raises(ValueError, match=r"The labels of val are 1 and -1 and never 0"):
        MultiLabelDataModule(train=Records(["0.jpg"] * 4, decode=lambda _: pixels), val=signed).setup()
    records = read_dataset(items, ["a", "b", "c"], target_kind="multi_hot", absent=-1)
    assert records.labels is not None
    assert np.array_equal(records.labels, [np.maximum(target, 0) for _, target in items])
    with pytest.raises(ValueError, match="absent=2 was given: pass -1, 'blank', a list of both, or 0"):
        read_dataset(items, ["a", "b", "c"], target_kind="multi_hot", absent=2)


# ---------------------------------------------------------------------- other headers


@pytest.mark.parametrize(
    "header",
    ["image,tags", "Image Index,Finding Labels", "file_name,label", "File Path,Classes", "filename,categories"],
)
def test_synonymous_headers_are_recognised(photos: Path, header: str) -> None:
    assert shown(read_manifest(joined(photos, "|".join, header))) == SHOWN


def test_any_header_can_be_selected(photos: Path) -> None:
    path = joined(photos, ";".join, "photo,shows")
    with pytest.raises(ValueError, match=r"has no path: expected path, labels and unknown, or pass path_column"):
        read_manifest(path)
    settings: dict[str, Any] = {"path_column": "photo", "label_columns": "shows", "separator": ";"}
    assert shown(read_manifest(path, **settings)) == SHOWN
    data = MultiLabelDataModule("manifest", photos, val_split="", **settings)
    data.setup()
    assert len(data.classes) == 4


@pytest.mark.parametrize(
    ("header", "settings", "sentence"),
    [
        ("image,file", {}, "has the columns image, file: choose one, path_column='image'"),
        ("path,tags,label", {}, "has the columns tags, label: choose one, label_columns='tags'"),
        (
            "path,labels",
            {"label_columns": ["label"]},
            r"has no column 'label' \(did you mean 'labels'\?\): it has path",
        ),
        ("path,labels", {"path_column": "photo"}, "has no column 'photo': it has path, labels"),
        ("path,sky,sky", {}, "has the column 'sky' twice: give each column a unique name"),
        ("path,labels", {"absent": -1}, "absent=-1 was given, and .* has names of classes: leave absent out"),
        (
            "path,sky",
            {"separator": ";"},
            "separator=';' was given, and .* has one column per class: leave separator",
        ),
    ],
)
def test_ambiguous_columns_are_refused(photos: Path, header: str, settings: dict[str, Any], sentence: str) -> None:
    path = table(photos, header, ",".join(["0.jpg", "1", "1"][: header.count(",") + 1]))
    with pytest.raises(ValueError, match=sentence):
        read_manifest(path, **settings)


def test_manifest_options_are_refused_for_other_formats(photos: Path) -> None:
    path = table(photos, '{"path": "0.jpg", "labels": ["a"]}', name="train.jsonl")
    with pytest.raises(ValueError, match=r"separator=';' was given, and .* has named fields: leave separator out"):
        read_manifest(path, separator=";")
    with pytest.raises(
        ValueError, match=r"separator=';' and dataset='coco' were given: separator is for manifest, leave"
    ):
        MultiLabelDataModule("coco", photos, separator=";")
    with pytest.raises(ValueError, match=r"absent='none' was given: pass -1, 'blank'"):
        MultiLabelDataModule("manifest", photos, absent="none")
    assert absent_values(["blank", 0]) == {"-1": -1, "blank": 0}


def test_a_name_in_two_spellings_of_unicode_is_one_class(photos: Path) -> None:
    path = table(photos, "path,labels", "0.jpg,caf\u00e9", "1.jpg,cafe\u0301")
    assert read_manifest(path).classes == ("caf\u00e9",)


def test_an_empty_name_in_json_is_refused(photos: Path) -> None:
    path = table(photos, '{"path": "0.jpg", "labels": ["a", " "]}', name="train.jsonl")
    with pytest.raises(ValueError, match=r"line 1 of .* has an empty name among its labels: give each class a name"):
        read_manifest(path)


def test_the_options_reach_the_reader_from_the_command_line() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(MultiLabelDataModule, "data", skip={"train", "val", "probe_train"})
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # before jsonargparse 4.49
    for words, name, value in (
        (["--data.absent", "-1"], "absent", -1),
        (["--data.absent", "blank"], "absent", "blank"),
        (["--data.absent", "[-1, blank]"], "absent", [-1, "blank"]),
        (["--data.separator", ";"], "separator", ";"),
        (["--data.separator", ","], "separator", ","),
        (["--data.separator", " "], "separator", " "),
        (["--data.separator", "|"], "separator", "|"),
        (["--data.label_columns", "Finding Labels"], "label_columns", "Finding Labels"),
        (["--data.label_columns", "[No Finding, Edema]"], "label_columns", ["No Finding", "Edema"]),
        (["--data.path_column", "Image Index"], "path_column", "Image Index"),
        (["--data.root", "[a, b]"], "root", ["a", "b"]),
        (["--data.classes", "[No Finding, Edema]"], "classes", ["No Finding", "Edema"]),
        (
            ["--data.probe.annotations", "a.json", "--data.probe.val_fraction", "0.2"],
            "probe",
            {"annotations": "a.json", "val_fraction": 0.2},
        ),
    ):
        data = instantiate(parser.parse_args(["--data.dataset=manifest", "--data.root=.", *words]))["data"]
        assert data.hparams[name] == value
