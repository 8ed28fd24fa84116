"""Every example runs; the configs are run in commands/test_cli.py."""

from __future__ import annotations

import ast
import math
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import wandb
import yaml
from PIL import Image
from safetensors.torch import load_file

from mlssl.run_folder import read_log

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

SMALL = {
    "quickstart.py": ["--epochs", "1", "--size", "32", "--batch_size", "8"],
    "own_lightning_project.py": ["--count", "64", "--epochs", "1"],
    "export_table.py": ["--architectures", "[test_resnet, test_vit]", "--formats", "[timm, torchvision]"],
    "own_images.py": ["--epochs", "1", "--size", "32", "--batch_size", "8", "--backbone", "test_resnet"],
    "log_to_wandb.py": ["--offline", "--epochs", "1", "--steps", "2"],
    "plain_pytorch.py": ["--count", "16", "--epochs", "1", "--batch_size", "8"],
    "own_loss_form.py": ["--epochs", "1", "--size", "32", "--batch_size", "8"],
    "own_augmentations.py": ["--epochs", "1", "--size", "32", "--batch_size", "8"],
    "overlap_positives.py": ["--epochs", "1", "--size", "32", "--batch_size", "8"],
    "momentum_target.py": ["--trainer.max_epochs", "1", "--data.batch_size", "8", "--data.size", "32"],
    "small_views.py": ["--trainer.max_epochs", "1", "--data.batch_size", "8", "--data.size", "32"],
}

RECIPES = ["momentum_target", "own_loss_form", "small_views", "own_augmentations", "overlap_positives"]
"""Examples of docs/own_recipe.md: a recipe of one's own without a change to the library."""


@pytest.fixture
def photographs(coco256, tmp_path) -> Path:
    """A folder of sixteen small images."""
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_the_quickstart_trains_on_a_folder_and_exports_the_backbone(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _run("quickstart.py", [*SMALL["quickstart.py"], "--folder", str(photographs)], monkeypatch)
    assert "loads into timm and gives features (1, 512)" in capsys.readouterr().out
    assert list(tmp_path.rglob("backbone.safetensors"))
    assert len(list(tmp_path.rglob("views/*.png"))) == 4


@pytest.mark.slow
def test_the_module_works_in_a_custom_lightning_project(tmp_path, monkeypatch, capsys):
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


def test_the_table_of_exports_has_a_number_for_each_supported_format(monkeypatch, capsys):
    _run("export_table.py", SMALL["export_table.py"], monkeypatch)
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert rows == ["| test_resnet | 0e+00 | — |", "| test_vit | 0e+00 | — |"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_custom_recipe_is_short_and_uses_no_private_name(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    nodes = list(ast.walk(ast.parse(text)))
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    docstrings = [node for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    no_code = {line for node in imports + docstrings for line in range(node.lineno, node.end_lineno + 1)}
    code = [line for number, line in enumerate(text.splitlines(), 1) if line.strip() and number not in no_code]
    assert len(code) <= 40
    names = [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    names += [one.name for node in imports for one in node.names]
    assert [one for one in names if one.startswith("_") and not one.endswith("__")] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("own_loss_form", "under custom __main__.decoupled"),
        ("own_augmentations", "with views of 2 branches"),
        ("overlap_positives", "with positives custom __main__.half_by_overlap"),
    ],
)
def test_a_custom_form_pipeline_and_positives_train(name, printed, photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
    _run(f"{name}.py", [*SMALL[f"{name}.py"], "--root", str(photographs)], monkeypatch)
    last = capsys.readouterr().out.splitlines()[-1]
    assert printed in last
    assert math.isfinite(float(re.search(r"loss (-?\d+\.\d+)", last)[1]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_momentum_teacher_is_trained_probed_exported_and_resumed(photographs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = sorted(path.name for path in photographs.iterdir())
    lines = [f"{name},{'odd' if index % 2 else 'even'}" for index, name in enumerate(names)]
    for split in ("train", "val"):
        (photographs / f"{split}.csv").write_text("\n".join(["path,labels", *lines, ""]))
    small = [*SMALL["momentum_target.py"], "--model.projection_dim", "32", "--model.predictor_dim", "8"]
    words = ["fit", "--config", str(EXAMPLES / "momentum_target.yaml"), "--data.dataset", "manifest", *small]
    _main("momentum_target.py", [*words, "--data.root", str(photographs)], monkeypatch)
    (folder,) = tmp_path.glob("runs/fit-*")
    logged = {name: log.values for name, log in read_log(folder).items()}
    assert {"probe/mAP", "probe/teacher/mAP", "train/pair_loss"} <= logged.keys()
    weights = {path.stem: load_file(path) for path in folder.glob("exports/*.safetensors")}
    teacher, student = (
        next(one for name, one in weights.items() if ("teacher" in name) is has) for has in (True, False)
    )
    assert teacher.keys() == student.keys()
    moved = [name for name in teacher if not torch.equal(teacher[name], student[name])]
    assert "conv1.weight" in moved
    assert (teacher["conv1.weight"] - student["conv1.weight"]).abs().max() < 0.1  # it follows the student
    _main("momentum_target.py", ["fit", "--resume", str(folder), "--trainer.max_epochs", "2"], monkeypatch)
    assert read_log(folder)["train/loss"].epochs[-1] == 1
    assert "momentum_target.MomentumTarget" in (folder / "config.yaml").read_text()


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_small_views_have_a_separate_term(photographs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--data.dataset", "folder", "--data.root", str(photographs), *SMALL["small_views.py"]]
    words += ["--model.backbone", "test_resnet", "--model.projection_dim", "32", "--model.predictor_dim", "8"]
    _main("small_views.py", [*words, "--data.local_views", "{count: 3, size: 16}"], monkeypatch)
    (folder,) = tmp_path.glob("runs/fit-*")
    logged = {name: log.values for name, log in read_log(folder).items()}
    assert all(math.isfinite(value) for value in logged["train/local_loss"])
    total = (
        logged["train/pair_loss"][-1] + 4 * logged["train/image_aware_loss"][-1] + 2 * logged["train/local_loss"][-1]
    )
    assert logged["train/loss"][-1] == pytest.approx(total, rel=1e-4)


def _main(name, words, monkeypatch):
    """Run an example that ends in sys.exit(main(…))."""
    with pytest.raises(SystemExit) as ended:
        _run(name, words, monkeypatch)
    assert ended.value.code == 0


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_run_is_logged_to_weights_and_biases_offline(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")  # undone afterwards; the logger would leave it set
    _run("log_to_wandb.py", SMALL["log_to_wandb.py"], monkeypatch)
    wandb.teardown()
    assert "the run: " in capsys.readouterr().out
    assert list(tmp_path.glob("runs/wandb/offline-run-*/run-*.wandb"))


@pytest.fixture
def tiny_corel(tmp_path) -> Path:
    """Corel-5K's layout with 48 training and 16 test images and two words, one per image."""
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
            "tag_quality",
            ["test_resnet", "--dataset", "corel5k", "--eval_size", "32"],
            "| test_resnet (untrained) | 1.000",
        ),
        ("step_cost", ["--networks", "[test_resnet]", "--size", "32", "--steps", "1"], "| test_resnet, 32 pixels | 0"),
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
    folders = {"probe": ["--root", corel], "time_to_quality": [corel]}
    folders["tag_quality"] = ["--root", corel, "--num_workers", "0"]
    folders |= {name: [] for name in ("loss", "probe_memory", "small_maps", "step_cost")}
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
        *(
            "authors_way",
            "albumentations_way",
            "gpu",  # in test_gpu_benchmark.py
            "gpu_measurements",
            "views",
            "loader",
            "loss",
            "probe",
            "probe_memory",
            *("recipes", "recipes_own", "recipes_page", "recipes_peers", "recipes_score"),  # in test_recipe_trials.py
            "small_maps",
            "step",
            "step_cost",
            "tag_quality",
            "time_to_quality",
        ),
    }
