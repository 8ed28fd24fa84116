"""Every example runs; the configs are run in commands/test_cli.py."""

from __future__ import annotations

import math
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
import wandb
import yaml
from PIL import Image

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

SMALL = {
    "quickstart.py": ["--epochs", "1", "--size", "32", "--batch_size", "8"],
    "own_lightning_project.py": ["--count", "64", "--epochs", "1"],
    "export_table.py": ["--architectures", "[test_resnet, test_vit]", "--formats", "[timm, torchvision]"],
    "own_images.py": ["--epochs", "1", "--size", "32", "--batch_size", "8", "--backbone", "test_resnet"],
    "log_to_wandb.py": ["--offline", "--epochs", "1", "--steps", "2"],
    "plain_pytorch.py": ["--count", "16", "--epochs", "1", "--batch_size", "8"],
}


@pytest.fixture
def photographs(coco256, tmp_path) -> Path:
    """A folder of sixteen small photographs."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for path in sorted(coco256.rglob("*.jpg"))[:16]:
        with Image.open(path) as photograph:
            photograph.resize((96, 64)).save(folder / path.name)
    return folder


def _run(name: str, words: list[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_run_here():
    elsewhere = {"fine_tune.py"}  # in test_transfer_examples.py, as those in detection/
    assert {file.name for file in EXAMPLES.glob("*.py")} - elsewhere == SMALL.keys()


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_the_quickstart_trains_on_a_folder_and_takes_the_backbone_away(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _run("quickstart.py", [*SMALL["quickstart.py"], "--folder", str(photographs)], monkeypatch)
    assert "loads into timm and gives features (1, 512)" in capsys.readouterr().out
    assert list(tmp_path.rglob("backbone.safetensors"))
    assert len(list(tmp_path.rglob("views/*.png"))) == 4


def test_the_module_works_in_a_lightning_project_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _run("own_lightning_project.py", SMALL["own_lightning_project.py"], monkeypatch)
    printed = capsys.readouterr().out
    assert "features (32, 2, 4, 512) (B, A, K, D)" in printed
    assert "features (64, 512) of 64 images" in printed


def test_the_method_runs_in_a_plain_loop_without_lightning(monkeypatch, capsys):
    before = {name for name in sys.modules if name.startswith("lightning")}
    _run("plain_pytorch.py", SMALL["plain_pytorch.py"], monkeypatch)
    assert {name for name in sys.modules if name.startswith("lightning")} == before
    loss = float(capsys.readouterr().out.split()[-1])
    assert math.isfinite(loss)


def test_the_table_of_exports_has_a_number_where_a_format_holds_the_network(monkeypatch, capsys):
    _run("export_table.py", SMALL["export_table.py"], monkeypatch)
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert rows == ["| test_resnet | 0e+00 | — |", "| test_vit | 0e+00 | — |"]


@pytest.mark.parametrize("path", sorted((EXAMPLES / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_opens_with_command_hardware_time_and_number(path):
    text = path.read_text()
    opening = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert f"mlssl fit --config examples/configs/{path.name}" in opening
    assert all(word in opening.lower() for word in ("hardware", "time", "map"))
    assert yaml.safe_load(text)["name"] == path.stem


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("source", ["folder", "manifest"])
def test_own_images_train_from_a_folder_and_from_a_manifest(source, photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = sorted(path.name for path in photographs.iterdir())
    lines = [f"{name},{'odd' if index % 2 else 'even'}" for index, name in enumerate(names)]
    (photographs / "train.csv").write_text("\n".join(["path,labels", *lines, ""]))
    words = {
        "folder": ["--folder", str(photographs)],
        "manifest": ["--manifest", str(photographs / "train.csv"), "--val", str(photographs / "train.csv")],
    }[source]
    _run("own_images.py", [*SMALL["own_images.py"], *words], monkeypatch)
    printed = capsys.readouterr().out
    assert ("2 classes" if source == "manifest" else "unlabelled") in printed
    assert ("mAP of the probe" in printed) == (source == "manifest")
    assert list(tmp_path.glob("runs/own_images/exports/backbone.safetensors"))


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_run_is_logged_to_weights_and_biases_offline(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")  # undone afterwards, where the logger would leave it behind
    _run("log_to_wandb.py", SMALL["log_to_wandb.py"], monkeypatch)
    wandb.teardown()
    assert "the run: " in capsys.readouterr().out
    assert list(tmp_path.glob("runs/wandb/offline-run-*/run-*.wandb"))


@pytest.fixture
def tiny_corel(tmp_path) -> Path:
    """Corel-5K's layout with 48 training and 16 test pictures of two words, one of them in each."""
    root = tmp_path / "corel"
    (root / "labels").mkdir(parents=True)
    (root / "labels" / "words").write_text("sky\nsea\n")
    for split, name, count in (("train", "training", 96), ("test", "test", 16)):
        (root / f"{split}_jpeg").mkdir()
        (root / "labels" / f"{name}_label").write_text("".join(f"{n} {1 + n % 2}\n" for n in range(1, count + 1)))
        for number in range(1, count + 1):
            Image.effect_noise((24, 16), 20 + 60 * (number % 2)).save(root / f"{split}_jpeg" / f"{number}.jpeg")
    return root


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:.*train_dataloader.*does not have many")
@pytest.mark.parametrize(
    ("name", "words", "printed"),
    [
        ("views", ["--images", "2", "--size", "32", "--passes", "1"], "ours"),
        (
            "loader",
            ["--images", "4", "--size", "32", "--batch_size", "2", "--workers", "[1]", "--rounds", "1"],
            "index",
        ),
        ("loss", ["--anchors", "64", "--width", "32", "--rounds", "1"], "plain"),
        ("small_maps", ["--views", "4", "--channels", "16", "--rounds", "1"], "6 × 6 → 3 × 3, float32"),
        ("probe", ["--source", "test_resnet"], "times faster"),
        ("probe_memory", ["--images", "1200", "--width", "16", "--labels", "3"], "beside MiB"),
        (
            "step",
            ["--dataset", "folder", "--size", "32", "--batch_size", "4", "--steps", "1", "--rounds", "1"],
            "TFLOP/s",
        ),
        (
            "time_to_quality",
            ["--size", "32", "--epochs", "3", "--limit", "1", "--target", "0.1", "--until_reached", "true"],
            "mAP 0.1 {'way': 'ours', 'epoch': 1,",
        ),
    ],
)
def test_a_benchmark_prints_its_rows(name, words, printed, photographs, tiny_corel, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    corel = str(tiny_corel)
    folders = {"loss": [], "small_maps": [], "probe": ["--root", corel], "probe_memory": [], "time_to_quality": [corel]}
    folder = folders.get(name, [str(photographs)])
    try:
        _run(f"benchmarks/{name}.py", [*folder, *words], monkeypatch)
    finally:
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, cores)
        sys.modules.pop("authors_way", None)
    out = capsys.readouterr().out
    assert printed in out
    assert "epoch 2" not in out  # the target was reached


def test_every_benchmark_is_run_here():
    assert {file.stem for file in (EXAMPLES / "benchmarks").glob("*.py")} == {
        *("authors_way", "views", "loader", "loss", "probe", "probe_memory", "small_maps", "step", "time_to_quality"),
    }
