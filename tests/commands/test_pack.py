"""`mlssl pack`, and the other commands on what it wrote."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import torch

from mlssl.cli import main

SMALL = [
    *("--model.backbone", "test_resnet", "--model.projection_dim", "16", "--model.predictor_dim", "8"),
    *("--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.num_sanity_val_steps", "0"),
    *(
        "--trainer.log_every_n_steps",
        "1",
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.enable_model_summary",
        "false",
        "--trainer.logger",
        "false",
    ),
    *("--data.batch_size", "8", "--data.size", "32", "--data.eval_size", "32", "--data.num_workers", "0"),
    *("--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1", "--trainer.max_epochs", "1"),
]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def weights(runs: str) -> dict[str, torch.Tensor]:
    (checkpoint,) = Path(runs).glob("*/checkpoints/last.ckpt")
    found: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return found


def scores(runs: str) -> list[dict[str, str]]:
    rows = []
    for name in ("table.csv", "classes.csv"):
        (table,) = Path(runs).glob(f"*/{name}")
        with table.open(newline="") as file:
            rows += list(csv.DictReader(file))
    return rows


@pytest.mark.slow
def test_coco_trains_and_scores_the_same_from_shards(coco256: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack", str(coco256), "--dataset", "coco", "--megabytes", "10", "-o", "packed"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith("packed: 128 train and 128 val images in ")
    assert said[-1] == "mlssl fit --data.dataset shards --data.root packed"
    roots = {"coco": str(coco256), "shards": "packed"}
    for name, root in roots.items():
        assert main(["fit", *SMALL, "--data.dataset", name, "--data.root", root, "--runs", f"fit-{name}"]) == 0
        words = ["--dataset", name, "--root", root, "--eval_size", "32", "--num_workers", "0", "--runs", f"knn-{name}"]
        assert main(["knn", "test_resnet", *words]) == 0
    files, shards = weights("fit-coco"), weights("fit-shards")
    assert all(torch.equal(shards[name], value) for name, value in files.items())
    assert scores("knn-shards") == scores("knn-coco")


def test_a_folder_is_packed_without_a_val_set_and_trains(coco256: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted((coco256 / "val2017").iterdir())[:24]:
        Path("photos").mkdir(exist_ok=True)
        shutil.copy(path, "photos")
    assert main(["pack", "photos"]) == 0
    assert "shards: 24 train images in 1 archive," in capsys.readouterr().out
    assert main(["fit", *SMALL, "--data.dataset", "shards", "--data.root", "shards"]) == 0
    assert main(["pack", "photos"]) == 2
    assert "'shards' exists, and nothing in it was changed: choose another path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "no folder 'nowhere'"),
        (["nowhere", "--dataset", "coco"], "no folder 'nowhere'"),
        (["."], "no image below"),
        (["photos", "--dataset", "synthetic"], "dataset='synthetic' has no image files to pack: pass the format of"),
        (["photos", "--dataset", "shards"], "dataset='shards' has no image files to pack"),
        (["photos", "--megabytes", "0"], "megabytes=0 was given: pass the size of an archive, at least 1"),
        (["nowhere", "--megabytes", "0"], "megabytes=0 was given"),  # before anything is read
        (["nowhere", "-o", "."], "'.' exists, and nothing in it was changed: choose another path"),
        (["photos", "--megabytes", "many"], "many"),
        (["photos", "--dataset", "tfrecord"], "tfrecord"),
        ([], "root"),
    ],
)
def test_bad_input_is_reported_in_one_line(
    words: list[str], message: str, coco256: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if words[:1] == ["photos"]:
        Path("photos").mkdir()
        shutil.copy(next((coco256 / "val2017").iterdir()), "photos")
    assert main(["pack", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("mlssl: error: ")
    assert message in line
    assert not Path("shards").exists()
