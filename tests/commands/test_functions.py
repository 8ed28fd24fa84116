"""A custom form and custom positives, by import path on the command line and in a config."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml

from commands.test_run import DATA, MODEL, TRAINER
from mlssl.cli import main
from mlssl.runs import RUN_FOLDER_VARIABLE

SMALL = [*MODEL, *TRAINER, *DATA]
MODULE = """
from pathlib import Path

from mlssl.losses import log_of_sum, same_image


def my_form(logits, weights):
    Path("called").touch()
    return 2 * log_of_sum(logits, weights)


def my_positives(cosines, of_one_image, boxes, key_boxes):
    return 0.5 * same_image(cosines, of_one_image, boxes, key_boxes)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module in the current directory, which no other test has imported."""
    monkeypatch.chdir(tmp_path)
    for name in (RUN_FOLDER_VARIABLE, "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"own_{tmp_path.name.replace('-', '_')}"
    Path(f"{name}.py").write_text(MODULE)
    return name


@pytest.mark.slow
def test_functions_are_imported_used_saved_as_text_and_found_on_resume(
    own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model.form", f"{own}.my_form", "--model.positives", f"{own}.my_positives"]
    assert main(["fit", *SMALL, *words, "--trainer.max_epochs", "1"]) == 0
    assert Path("called").exists()
    (folder,) = Path("runs").glob("*")
    settings = yaml.safe_load((folder / "config.yaml").read_text())["model"]
    assert (settings["form"], settings["positives"]) == (f"{own}.my_form", f"{own}.my_positives")
    last = folder / "checkpoints" / "last.ckpt"
    kept = torch.load(last, weights_only=True)["hyper_parameters"]
    assert (kept["form"], kept["positives"]) == (f"custom {own}.my_form", f"custom {own}.my_positives")

    Path("called").unlink()
    assert main(["fit", "--resume", str(folder), "--trainer.max_epochs", "2"]) == 0
    assert Path("called").exists()
    # To train from the checkpoint alone, pass them again; features need neither.
    few = [*TRAINER, *DATA, "--trainer.limit_val_batches", "1"]
    assert main(["validate", "--ckpt_path", str(last), *few]) == 0
    capsys.readouterr()
    assert main(["fit", "--ckpt_path", str(last), *TRAINER, *DATA, "--trainer.max_epochs", "3"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        f"trained with form='custom {own}.my_form', a function that it does not contain: pass it again, --model.form"
        in line
    )
    assert main(["fit", "--ckpt_path", str(last), *TRAINER, *DATA, "--trainer.max_epochs", "3", *words]) == 0


def test_names_of_the_library_remain_text(own: str) -> None:
    words = ["--model.form", "mean_of_logs", "--model.positives", "gated(0.3)", "--trainer.max_epochs", "1"]
    assert main(["fit", *SMALL, *words]) == 0
    (last,) = Path("runs").glob("*/checkpoints/last.ckpt")
    kept = torch.load(last, weights_only=True)["hyper_parameters"]
    assert (kept["form"], kept["positives"]) == ("mean_of_logs", "gated(0.3)")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.form", "nowhere.form"], "--model.form names 'nowhere.form', which cannot be imported"),
        (["--model.positives", "{own}.nothing"], "nothing', which cannot be imported"),
        (["--model.form", "log_of_sums"], "log_of_sum"),
    ],
)
def test_a_path_that_is_not_a_function_is_reported_in_one_line(
    words: list[str], message: str, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *SMALL, *[word.replace("{own}", own) for word in words]]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("mlssl: error: ")
    assert message in line
