"""`mlssl linear` and `mlssl knn`: one table, its files, and bad input in one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlssl.cli import main
from mlssl.runs import RUN_FOLDER_VARIABLE

SMALL = ["--eval_size", "32", "--num_workers", "0"]
COREL = ["--eval_size", "[32, 48]", "--min_images_per_class", "[40, 4]", "--num_workers", "0"]


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(RUN_FOLDER_VARIABLE, "")


def results(name: str) -> tuple[Path, Any]:
    (folder,) = Path("runs").glob(f"{name}-*")
    return folder, json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_two_backbones_in_one_table_with_its_files(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["linear", "test_resnet", "test_vit", "--fractions", "[0.01, 1.0]", "--cache", "features", *SMALL]
    assert main(words) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0].startswith("synthetic: 2000 training and 500 test images, 12 classes, threshold 0.5")
    assert lines[1] == "whole images of 32 × 32 pixels, pooling avgmax"
    assert lines[2].split()[:3] == ["backbone", "linear", "mAP"]
    for column in ("95 % interval", "mAP (≥10)", "kNN mAP (k 20)", "OF1", "1 % of labels", "100 % of labels"):
        assert column in lines[2]
    assert [line.split()[:2] for line in lines[3:5]] == [["test_resnet", "(untrained)"], ["test_vit", "(untrained)"]]
    assert lines[6].startswith("test_vit (untrained) − test_resnet (untrained)  ")
    assert lines[7].startswith("positives in the test images; 0 of 12 classes")
    assert "images/s" in shown.err, "a bar"

    folder, written = results("linear")
    assert [one["source"] for one in written["results"]] == ["test_resnet (untrained)", "test_vit (untrained)"]
    for one in written["results"]:
        assert one["interval"][0] < one["mAP"] < one["interval"][1]
        assert 0 < one["knn_mAP"] < 1
        few, whole = one["few_labels"]
        assert few["num_images"] == 20
        assert len(few["mAPs"]) == 5
        assert whole["mAPs"] == [one["mAP"]]
        values = list(one["average_precision"].values())
        assert sum(values) / 12 == pytest.approx(one["mAP"])
    with (folder / "classes.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12
    with (folder / "table.csv").open() as file:
        assert [row["backbone"] for row in csv.DictReader(file)] == ["test_resnet (untrained)", "test_vit (untrained)"]
    with Image.open(folder / "average_precision.png") as picture:
        assert min(picture.size) > 300
    files = "average_precision.png, classes.csv, differences.csv, results.json, table.csv"
    assert lines[-1] == f"{folder}: {files}"

    # The second time the features are cached, and another folder gets the same numbers.
    assert main(["knn", "test_resnet", "--cache", "features", "--k", "20", *SMALL]) == 0
    _, neighbors = results("knn")
    assert neighbors["results"][0]["mAP"] == pytest.approx(written["results"][0]["knn_mAP"])
    assert len(neighbors["results"][0]["jaccard"]) == 20


@pytest.mark.slow
def test_knn_of_photographs(corel5k: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["knn", "test_resnet", "--dataset", "corel5k", "--root", str(corel5k), *COREL, "--k", "5"]) == 0
    printed = capsys.readouterr().out
    assert "4500 voting and 499 test images, 81 classes, k 5" in printed
    assert "Jaccard@1" in printed
    assert "Jaccard@5" in printed


@pytest.mark.slow
def test_a_protocol_that_trains_runs_by_its_name(coco256: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["linear", "test_resnet", "--protocol", "coco-448", "--root", str(coco256), "--epochs", "1"]
    assert main([*words, "--num_workers", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "coco-448: 128 training images of 'train2017', 128 test images of 'val2017', 80 classes, threshold 0.5, "
        "the last of 1 epochs is reported; the protocol has 100"
    )
    assert any(line.startswith("no positive in the test images for") for line in lines)
    _, written = results("linear")
    assert written["results"][0]["classes"] < 80
    assert written["settings"]["protocol"] == "coco-448"


BAD_INPUT = {
    "a file that is missing": (["linear", "nowhere.ckpt"], "no file 'nowhere.ckpt'"),
    "a backbone that comes twice": (["knn", "test_resnet", "test_vit", "test_resnet", *SMALL], "test_resnet was given"),
    "a tag that is unknown": (["linear", "test_resnet.x", *SMALL], "no published weights with the tag 'x', its tags"),
    "a name that is unknown": (["knn", "resnet5O"], "did you mean 'resnet50'"),
    "a protocol that is unknown": (["linear", "test_resnet", "--protocol", "voc"], "coco-448"),
    "a protocol and a size": (
        ["linear", "test_resnet", "--protocol", "coco-448", "--root", ".", "--eval_size", "64"],
        "coco-448 fixes data set, splits, sizes, classes and threshold",
    ),
    "a protocol and the size it has anyway": (
        ["linear", "test_resnet", "--protocol", "corel5k", "--root", ".", "--eval_size", "224"],
        "corel5k fixes data set, splits, sizes, classes and threshold: leave out --eval_size, or the protocol",
    ),
    "a protocol and a data set": (
        ["linear", "test_resnet", "--protocol", "coco-448", "--root", ".", "--dataset", "synthetic"],
        "leave out --dataset, or the protocol",
    ),
    "a protocol and its threshold": (
        ["linear", "test_resnet", "--protocol", "corel5k", "--root", ".", "--threshold", "0.5"],
        "leave out --threshold, or the protocol",
    ),
    "a protocol that trains, and options of a probe": (
        [
            *("linear", "test_resnet", "--protocol", "coco-448", "--root", ".", "--fractions", "[0.5]"),
            *("--pos_weight", "1", "--pooling", "avgmax", "--batch_size", "64", "--cache", "features"),
        ],
        "and how images become features and scores: leave out --pooling and --batch_size and --fractions and "
        "--pos_weight and --cache, or the protocol",
    ),
    "a protocol of support vectors, and a pooling": (
        ["linear", "test_resnet", "--protocol", "voc07-svm", "--root", ".", "--pooling", "avg"],
        "leave out --pooling, or the protocol",
    ),
    "epochs without a protocol": (
        ["linear", "test_resnet", "--epochs", "3", *SMALL],
        "--epochs 3 was given, but nothing is trained by epochs here: leave it out, or pass a protocol that trains",
    ),
    "epochs and a protocol that has none": (
        ["linear", "test_resnet", "--protocol", "corel5k", "--root", ".", "--epochs", "3"],
        "--epochs 3 was given, but nothing is trained by epochs here",
    ),
    "more neighbours than images": (
        ["knn", "test_resnet", "--k", "2001", *SMALL],
        "k=2001 was given, but there are 2000",
    ),
    "a data set that is missing": (["linear", "test_resnet", "--dataset", "coco", "--root", "nowhere"], "nowhere"),
    "a threshold out of range": (["linear", "test_resnet", "--threshold", "2", *SMALL], "threshold=2.0 was given"),
    "a weight of nothing": (["linear", "test_resnet", "--pos_weight", "0", *SMALL], "pos_weight=0"),
    "a temperature of 0": (["knn", "test_resnet", "--temperature", "0", *SMALL], "temperature=0.0 was given"),
    "a share of nothing": (["linear", "test_resnet", "--fractions", "[0.0001]", *SMALL], "fraction 0.0001 of 2000"),
}


@pytest.mark.parametrize(("words", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_reported_in_one_line_before_any_pass(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    line = shown.err.strip().splitlines()[-1]
    assert line.startswith("mlssl: error: ")
    assert message in line
    assert "images/s" not in shown.err
    assert not list(Path().rglob("results.json"))


def test_a_set_without_labels_is_refused(coco256: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(coco256 / "train2017")
    assert main(["linear", "test_resnet", "--dataset", "folder", "--root", folder, *SMALL]) == 2
    assert "an evaluation needs labelled training and test images" in capsys.readouterr().err


def voc_tree(root: Path, year: str, split: str, count: int, seed: int) -> None:
    """A VOCdevkit with images whose colour determines their labels."""
    generator = np.random.default_rng(seed)
    base = root / f"VOC{year}"
    for name in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (base / name).mkdir(parents=True, exist_ok=True)
    stems = [f"{seed * 1000 + index:06}" for index in range(count)]
    (base / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems) + "\n")
    for stem in stems:
        there = generator.random(3) < 0.5
        pixels = generator.integers(0, 60, (48, 64, 3)) + 190 * there
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(base / "JPEGImages" / f"{stem}.jpg")
        objects = "".join(
            f"<object><name>{name}</name><difficult>{int(generator.random() < 0.1)}</difficult></object>"
            for name, shown in zip(("cat", "dog", "sheep"), there, strict=True)
            if shown
        )
        (base / "Annotations" / f"{stem}.xml").write_text(
            f"<annotation><filename>{stem}.jpg</filename>{objects}</annotation>"
        )


@pytest.mark.parametrize("protocol", ["voc12-to-voc07", "voc07-svm"])
def test_voc_protocols_run_on_a_voc_folder(protocol: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (year, split) in enumerate((("2012", "trainval"), ("2007", "trainval"), ("2007", "test"))):
        voc_tree(tmp_path / "VOCdevkit", year, split, 24, number)
    words = ["linear", "test_resnet", "--protocol", protocol, "--root", str(tmp_path / "VOCdevkit"), "--num_workers"]
    assert main([*words, "0", *(["--epochs", "2"] if protocol == "voc12-to-voc07" else [])]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"{protocol}: 24 training images")
    assert "20 classes" in first
    _, written = results("linear")
    assert written["results"][0]["classes"] == 3
    assert 0.3 < written["results"][0]["mAP"] <= 1
