"""Data sets as annotation tools write them, in the commands that read data sets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mlssl.drawing.views
from mlssl.cli import main
from mlssl.commands.evaluation import labelled_sets, set_name
from mlssl.commands.evaluation_options import EvaluationOptions
from mlssl.data.readers.shards import read_shards


@pytest.fixture(autouse=True)
def _work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight images, with a Label Studio task for each."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    dice, tasks = np.random.default_rng(0), []
    for number in range(8):
        Image.fromarray(dice.integers(0, 256, (40, 48, 3), np.uint8)).save(f"photos/{number}.png")
        result = [{"value": {"choices": ["cup", "sky"][: 1 + number % 2]}}]
        image = f"/data/upload/1/0a1b2c3d-{number}.png"
        tasks.append({"data": {"image": image}, "annotations": [{"result": result}]})
    Path("tasks.json").write_text(json.dumps(tasks))
    Path("list.csv").write_text("path,labels\n0.png,cup;sky\n1.png,sky\n2.png,cup\n")


def test_an_evaluation_reads_what_fit_reads() -> None:
    options = EvaluationOptions(annotations="tasks.json", images="photos", val_fraction=0.25, classes=["sky", "cup"])
    _, train, test = labelled_sets(options)
    assert (len(train), len(test), train.classes) == (6, 2, ("sky", "cup"))
    assert set_name(options) == "tasks.json"
    alone = EvaluationOptions(annotations="tasks.json", images="photos")
    with pytest.raises(
        ValueError, match=r"needs labelled training and test images: .*, or --val_fraction 0\.2 to hold"
    ):
        labelled_sets(alone)


def test_pack_takes_annotations_of_the_images_in_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", "photos", "--annotations", "tasks.json", "--val_fraction", "0.25", "-o", "packed"]) == 0
    assert "packed: 6 train and 2 val images" in capsys.readouterr().out
    packed = read_shards("packed", "val")
    assert (packed.classes, len(packed)) == (("cup", "sky"), 2)
    words = ["photos", "--annotations", "tasks.json", "--images", "photos", "-o", "other"]
    assert main(["pack", *words]) == 2
    assert "with annotations, pass one image folder as the first argument" in capsys.readouterr().err


def test_neighbors_searches_a_set(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["photos/0.png", "photos", "--dataset", "manifest", "--separator", ";"]
    small = ["--backbone", "test_resnet", "--size", "32", "--k", "2"]
    Path("list.csv").rename("photos/list.csv")
    assert main(["neighbors", *words, *small, "--train_split", "list.csv"]) == 0
    assert "its 2 most similar images of 3" in capsys.readouterr().out
    assert main(["neighbors", "photos/0.png", "photos", "--white", "0", *small]) == 2
    assert "white=0.0 was given: pass a white level above 0" in capsys.readouterr().err


def test_a_protocol_refuses_other_sets(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["linear", "test_resnet", "--protocol", "corel5k", "--root", "photos", "--val_fraction", "0.2"]
    assert main(words) == 2
    assert "leave out --val_fraction, or the protocol" in capsys.readouterr().err


def test_help_all_explains_what_help_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["knn", "--help_all"]) == 0
    assert "Fraction of the images to hold out for validation." in " ".join(capsys.readouterr().out.split())


def test_views_show_an_image_as_white_scales_it(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(mlssl.drawing.views, "draw_view_grid", lambda image, *_, **__: drawn.append(int(image.max())))
    Image.fromarray(np.full((40, 48), 4095, np.uint16)).save("x-ray.png")
    Path("run.yaml").write_text("data: {white: 4095}\n")
    for given in (["--white", "4095"], ["--config", "run.yaml"], ["--config", "run.yaml", "--white", "8190"]):
        assert main(["views", "x-ray.png", "--size", "32", *given]) == 0
    assert drawn == [255, 255, 128]
