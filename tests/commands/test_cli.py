"""The command, called in process; the README's test runs the demo in a separate process."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from mlssl.cli import main
from mlssl.embeddings.files import read_embeddings
from mlssl.module import MultiLabelSSLModule
from mlssl.runs import RUN_FOLDER_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "examples" / "configs"
SMALL_MODEL = ["--model.backbone", "test_resnet", "--model.projection_dim", "16", "--model.predictor_dim", "8"]
SMALL_TRAINER = [
    *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"),
    *("--trainer.limit_val_batches", "1", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false", "--trainer.precision", "32-true"),
]
SMALL_DATA = ["--data.batch_size", "8", "--data.size", "32", "--data.eval_size", "64", "--data.num_workers", "0"]
SMALL = [*SMALL_MODEL, *SMALL_TRAINER, *SMALL_DATA]


@pytest.fixture(autouse=True)
def _work_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(RUN_FOLDER_VARIABLE, "")
    monkeypatch.setenv("PL_GLOBAL_SEED", "")
    monkeypatch.setenv("PL_SEED_WORKERS", "")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Folder of a small run on drawn scenes."""
    folder = tmp_path_factory.mktemp("fit")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in (RUN_FOLDER_VARIABLE, "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "")
        assert main(["fit", "--name", "small", *SMALL]) == 0
    (path,) = (folder / "runs").iterdir()
    return path


def test_a_run_has_one_folder_with_all_its_files(run):
    assert run.name.startswith("small-")
    names = {file.relative_to(run).as_posix() for file in run.rglob("*") if file.is_file()}
    assert {"config.yaml", "metrics.csv", "checkpoints/last.ckpt", "exports/backbone.safetensors"} <= names
    assert sum(name.startswith("views/") and name.endswith(".png") for name in names) == 4


def test_the_log_contains_losses_probe_collapse_and_throughput(run):
    with (run / "metrics.csv").open() as file:
        logged = {name for row in csv.DictReader(file) for name, value in row.items() if value}
    assert {
        *("train/loss", "train/pair_loss", "train/image_aware_loss", "probe/mAP", "collapse/std", "collapse/rank"),
        *("time/data", "time/step", "throughput/images_per_s"),
    } <= logged


def test_the_saved_config_contains_every_setting_and_runs_again(run):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["model"]["backbone"] == "test_resnet"
    assert settings["seed_everything"] == 0
    assert main(["fit", "--config", str(run / "config.yaml"), "--name", "again"]) == 0
    (again,) = Path("runs").iterdir()
    first, second = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for folder in (run, again)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_hyper_parameters_are_restored_from_the_checkpoint(run):
    loaded = MultiLabelSSLModule.load_from_checkpoint(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert loaded.hparams["projection_dim"] == 16
    assert loaded.hparams["backbone"] == "test_resnet"


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_checkpoint_is_validated_and_tested(run, command):
    words = [*SMALL_DATA, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    limits = ["--trainer.limit_test_batches", "1"]
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    assert main([command, "--ckpt_path", checkpoint, "--trainer.limit_val_batches", "1", *limits, *words]) == 0


def test_embeddings_of_a_run_a_checkpoint_and_an_export_are_the_same(run, coco256, capsys):
    photographs = sorted((coco256 / "val2017").glob("*.jpg"))[:3]
    for number, photograph in enumerate(photographs):
        Path("photos").mkdir(exist_ok=True)
        Path(f"photos/{number}.jpg").write_bytes(photograph.read_bytes())
    Path("photos/bad.jpg").write_bytes(b"no image")
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    assert main(["export", checkpoint, "-o", "out.safetensors"]) == 0
    found = []
    for number, source in enumerate((str(run), checkpoint, "out.safetensors")):
        assert main(["predict", source, "photos", "-o", f"{number}.safetensors", "--size", "[32, 64]"]) == 0
        said = capsys.readouterr()
        assert "1 images cannot be decoded and are left out: bad.jpg" in said.out
        assert "100%" in said.err.splitlines()[-1]
        found.append(read_embeddings(Path(f"{number}.safetensors")))
    for one in found:
        assert one.names == ["0.jpg", "1.jpg", "2.jpg"]
        torch.testing.assert_close(one.rows, found[0].rows)
        assert (one.about["size"], one.about["pooling"]) == ("[32, 64]", "avg")
    assert main(["predict", checkpoint, "photos", "-o", "maps.npy", "--patches", "true", "--size", "[32, 64]"]) == 0
    maps = read_embeddings(Path("maps.npy"))
    torch.testing.assert_close(maps.rows.mean((2, 3)), found[0].rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "a.txt"], "has an unknown format: use the suffix .safetensors, .npy, .csv, .parquet"),
        (["-o", "a.csv", "--patches", "true"], "is a table, which cannot contain feature maps"),
        (["-o", "a.npy", "--patches", "true", "--pooling", "max"], "--patches does not pool"),
        (["-o", "there.csv"], "'there.csv' exists"),
        (["-o", "a.csv", "--batch_size", "0"], "batch_size=0 was given: pass at least 1"),
        (["-o", "a.csv", "--devices", "[tape]"], "there is no device 'tape'"),
        (["-o", "a.csv"], "none of the 1 images of photos can be decoded, first bad.jpg"),
    ],
)
def test_predict_refuses_wrong_input_in_one_line_and_writes_nothing(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("there.csv").write_text("mine")
    Path("photos").mkdir()
    Path("photos/bad.jpg").write_bytes(b"no image")
    assert main(["predict", "test_resnet", "photos", "--size", "32", *words]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["photos", "there.csv"]


def test_the_backbone_of_a_checkpoint_is_exported(run, capsys):
    assert main(["export", str(run / "checkpoints" / "last.ckpt"), "-o", "out.safetensors"]) == 0
    printed = capsys.readouterr().out
    assert "out.safetensors" in printed
    assert "largest difference" in printed
    assert timm.create_model("test_resnet", num_classes=0, checkpoint_path="out.safetensors").num_features > 0


def test_the_views_of_a_photograph_are_drawn(coco256, capsys):
    photograph = sorted(coco256.rglob("*.jpg"))[0]
    assert main(["views", str(photograph), "-o", "grid.png", "--size", "64"]) == 0
    assert "4 blocks and 8 views" in capsys.readouterr().out
    with Image.open("grid.png") as picture:
        assert min(picture.size) > 200


def test_a_folder_of_photographs_trains_without_labels(tmp_path, capsys):
    photos = tmp_path / "photos" / "deeper"
    photos.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(16):
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(photos / f"{index}.jpg")
    assert main(["fit", "--data.dataset", "folder", "--data.root", str(tmp_path / "photos"), *SMALL]) == 0
    long = ["--trainer.limit_train_batches", "1.0"]  # two steps, fewer than between two rows of the log
    assert main(["fit", "--data.dataset", "folder", "--data.root", str(tmp_path / "photos"), *SMALL, *long]) == 0
    for metrics in Path("runs").glob("*/metrics.csv"):
        assert "train/loss" in metrics.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "images"), [("corel5k_resnet18", "corel5k"), ("coco_resnet50", "coco256")])
def test_a_config_trains_on_real_images(name, images, request):
    root = request.getfixturevalue(images)
    # A tiny network on views of full size: the config's ResNet-50 takes minutes.
    words = ["fit", "--config", str(CONFIGS / f"{name}.yaml"), "--data.root", str(root)]
    assert main([*words, *SMALL_MODEL, *SMALL_TRAINER, "--data.batch_size", "4", "--data.num_workers", "0"]) == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith(name)
    with (folder / "metrics.csv").open() as file:
        assert any(row.get("probe/mAP") for row in csv.DictReader(file))


def test_help_fits_a_screen_and_names_every_command(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 24
    assert all(f"  {name} " in printed for name in ("demo", "fit", "linear", "views", "export"))
    assert main([]) == 0
    assert main(["--version"]) == 0


def _coco(tmp_path: Path, annotations: object) -> list[str]:
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        (tmp_path / "annotations").mkdir(exist_ok=True)
        text = annotations if isinstance(annotations, str) else json.dumps(annotations)
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(text)
    return ["--data.dataset", "coco", "--data.root", str(tmp_path)]


BAD_INPUT = {
    "no such command": (["fitt"], "no command 'fitt'"),
    "no root": (["fit", *SMALL, "--data.dataset", "coco", "--data.root", "nowhere"], "nowhere"),
    "root not given": (["fit", "--data.dataset", "corel5k"], "needs its folder"),
    "unknown backbone": (["fit", "--model.backbone", "resnet5O"], "resnet50"),
    "overlap": (["fit", "--data.overlap", "0.7"], "overlap"),
    "rows": (["fit", "--data.rows", "0"], "rows"),
    "cols": (["fit", "--data.cols", "0"], "cols"),
    "size": (["fit", "--data.size", "8"], "size"),
    "temperature": (["fit", "--model.temperature", "0"], "temperature=0"),
    "one image a step": (["fit", *SMALL, "--data.batch_size", "1"], "at least 2"),
    "batch too large": (["fit", *SMALL, "--data.batch_size", "5000"], "smaller batch_size"),
    "no image": (["views", "nothing.jpg"], "there is no file or folder 'nothing.jpg': check the path"),
    "no checkpoint": (["export", "nothing.ckpt"], "nothing.ckpt"),
    "no backbone": (["linear", "resnet5O"], "resnet50"),
}


@pytest.mark.parametrize(("words", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_reported_in_one_line_before_training(words, message, capsys):
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("mlssl: error: ")
    assert message in lines[-1]
    assert not list(Path().rglob("*.ckpt"))


def test_a_file_that_is_not_a_checkpoint_is_named(coco256, capsys):
    photograph = next(coco256.rglob("*.jpg"))
    assert main(["linear", str(photograph)]) == 2
    assert f"{photograph} is not a checkpoint or is damaged" in capsys.readouterr().err


def test_a_failed_run_leaves_no_empty_folder(tmp_path):
    assert main(["fit", *SMALL, *_coco(tmp_path, "not JSON")]) == 2
    assert not list(tmp_path.glob("runs/*"))


def test_a_traceback_is_shown_on_request():
    with pytest.raises(ValueError, match="overlap"):
        main(["fit", "--data.overlap", "0.7", "--traceback"])
