"""Mistakes in the Trainer's settings: one sentence, exit code 2, before any step."""

from __future__ import annotations

import re
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from _toy import small
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mlssl.callbacks import CollapseMonitor, LearningRate, OnlineKNN, OnlineLinearProbe, Throughput
from mlssl.cli import main
from mlssl.commands.argument_errors import plain_message
from mlssl.commands.trainer_checks import check_monitored, check_trainer, logged_metrics, trainer_message
from mlssl.module import MultiLabelSSLModule

SMALL = [
    *("--model.backbone", "test_resnet", "--model.projection_dim", "16", "--model.predictor_dim", "8"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.precision", "32-true"),
    *("--data.batch_size", "8", "--data.size", "32", "--data.eval_size", "32", "--data.num_workers", "0"),
]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": 0}, r"--trainer\.devices 0 was given: pass a number of devices"),
        ({"devices": "0", "accelerator": "cpu"}, r"--trainer\.devices 0 was given: .*such as --trainer\.devices 1"),
        ({"devices": []}, r"--trainer\.devices \[\] was given"),
        ({"devices": -2}, r"--trainer\.devices -2 was given"),
        ({"devices": -1, "accelerator": "cpu"}, r"--trainer\.devices -1 was given: .*or of processes on a CPU"),
        ({"devices": [0, 7], "accelerator": "cpu"}, r"--trainer\.devices \[0, 7\] was given"),
        ({"max_epochs": -5}, r"--trainer\.max_epochs -5 was given: pass a number of epochs, or -1 for no limit"),
        ({"max_steps": -7}, r"--trainer\.max_steps -7 was given"),
        ({"num_nodes": 0}, r"--trainer\.num_nodes 0 was given: pass the number of machines"),
        ({"accumulate_grad_batches": 0}, r"--trainer\.accumulate_grad_batches 0 was given"),
        ({"check_val_every_n_epoch": 0}, r"--trainer\.check_val_every_n_epoch 0 was given"),
        ({"gradient_clip_val": -1.0}, r"--trainer\.gradient_clip_val -1\.0 was given"),
        ({"gradient_clip_val": float("nan")}, r"--trainer\.gradient_clip_val nan was given"),
        ({"limit_train_batches": 0}, r"--trainer\.limit_train_batches 0 was given: pass a fraction of the batches"),
        ({"limit_train_batches": 1.5}, r"--trainer\.limit_train_batches 1\.5 was given"),
        ({"limit_val_batches": -3}, r"--trainer\.limit_val_batches -3 was given"),
        ({"overfit_batches": -0.5}, r"--trainer\.overfit_batches -0\.5 was given"),
        ({"val_check_interval": 0}, r"--trainer\.val_check_interval 0 was given"),
        ({"val_check_interval": float("inf")}, r"--trainer\.val_check_interval inf was given"),
        ({"min_epochs": 5, "max_epochs": 2}, r"--trainer\.min_epochs 5 is above --trainer\.max_epochs 2"),
        ({"min_steps": 5, "max_steps": 2}, r"--trainer\.min_steps 5 is above --trainer\.max_steps 2"),
        ({"barebones": True}, r"--trainer\.barebones disables the log and the checkpoints"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_trainer(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"devices": 3, "accelerator": "cpu", "max_epochs": -1, "max_steps": -1, "min_epochs": 3},
        {"limit_train_batches": 0.1, "limit_val_batches": 0, "val_check_interval": 0.25, "overfit_batches": 0.0},
        {"limit_train_batches": 3.0, "limit_val_batches": 1.0, "accelerator": "tpu", "devices": "auto"},
        {"min_epochs": 5, "max_epochs": None, "min_steps": 2, "max_steps": -1, "gradient_clip_val": 0.5},
    ],
)
def test_possible_settings_are_accepted(settings: dict[str, Any]) -> None:
    check_trainer(settings)


def test_missing_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for accelerator in ("gpu", "cuda", "mps"):
        with pytest.raises(ValueError, match=rf"accelerator {accelerator} was given, but torch .* finds no such"):
            check_trainer({"accelerator": accelerator})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for devices in (2, "2", "0,1", [1], -1, "auto"):
        check_trainer({"accelerator": "gpu", "devices": devices})
    for devices in (3, "3", "0,2", [2]):
        with pytest.raises(ValueError, match=r"devices .* was given, but this machine has 2: pass"):
            check_trainer({"accelerator": "auto", "devices": devices})


def test_a_metric_that_nothing_logs_is_refused() -> None:
    module, probe = small(), OnlineLinearProbe()
    check_monitored([probe, ModelCheckpoint(), EarlyStopping("probe/mAP"), ModelCheckpoint(monitor="loss")], module)
    with pytest.raises(
        ValueError, match=r"EarlyStopping monitors 'probe/map', .*: did you mean 'probe/mAP'\? The run logs"
    ):
        check_monitored([probe, EarlyStopping("probe/map")], module)
    with pytest.raises(ValueError, match=r"ModelCheckpoint monitors 'knn/mAP', which nothing in this run logs"):
        check_monitored([probe, ModelCheckpoint(monitor="knn/mAP")], module)
    check_monitored([OnlineKNN(), ModelCheckpoint(monitor="knn/mAP"), LearningRateMonitor()], module)

    class Own(MultiLabelSSLModule):
        pass

    check_monitored([EarlyStopping("anything")], small(kind=Own))


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names that a run of two steps logs, with every callback that logs to the Trainer."""
    found: set[str] = set()
    folder = tmp_path_factory.mktemp("run")
    words = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    words += ["--trainer.callbacks+=mlssl.callbacks.OnlineKNN", "--trainer.callbacks.every_n_epochs=1"]
    words += [f"--runs={folder}", "--trainer.logger=false", "--trainer.log_every_n_steps=1"]
    assert main(["fit", *SMALL, *words]) == 0
    (log,) = folder.glob("*/metrics.csv")
    found.update(log.read_text().splitlines()[0].split(","))
    return found - {"epoch", "step"}


def test_the_known_names_are_those_that_a_run_logs(logged: set[str]) -> None:
    callbacks = [OnlineLinearProbe(), OnlineKNN(), CollapseMonitor(), Throughput(), LearningRate()]
    assert logged_metrics(callbacks, small()) - logged == {"loss"}  # only in the bar
    assert {name for name in logged if not name.startswith("representation/")} <= logged_metrics(callbacks, small())


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "You requested to check 0.001 of the `val_dataloader` but 0.001 * 63 < 1. Please increase …",
            "--trainer.limit_val_batches 0.001 of 63 batches leaves none: pass at least 0.016, or a whole number",
        ),
        (
            "Early stopping conditioned on metric `a` which is not available. … any of the following: `b`, `c/d`",
            "A callback monitors 'a', which nothing in this run logged: pass one of b, c/d.",
        ),
        (
            "`ModelCheckpoint(monitor='a')` could not find the monitored key in the returned metrics: ['b', 'c/d'].",
            "A callback monitors 'a', which nothing in this run logged: pass one of b, c/d.",
        ),
        ("Some of\n its own.", "The Trainer refuses its settings (Some of its own): change that --trainer option."),
    ],
)
def test_refusals_of_the_trainer_are_reported_in_one_sentence(message: str, said: str) -> None:
    assert trainer_message(message).startswith(said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trainer.precision", "17"], r"--trainer\.precision takes 64, 32, .*bf16-mixed.*, and 17 was given"),
        (["--trainer.detect_anomaly", "x"], r"--trainer\.detect_anomaly takes true or false, and x was given"),
        (["--trainer.deterministic", "x"], r"--trainer\.deterministic takes warn, true or false, and x was given"),
        (["--trainer.max_epochs", "two"], r"--trainer\.max_epochs takes a whole number, and two was given"),
        (["--data.on_bad_image", "x"], r"--data\.on_bad_image takes stop, skip, and x was given"),
        (["--trainer.callbacks+=EarlyStopping"], r"EarlyStopping needs --trainer\.callbacks\.monitor"),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=a", "--trainer.callbacks.mode=up"],
            r"--trainer\.callbacks: `mode` can be min, max, got up",
        ),
        (
            ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=3"],
            r"--trainer\.callbacks: ModelCheckpoint\(save_top_k=3, monitor=None\) is not a valid configuration",
        ),
        (["--trainer.callbacks+=Nonsense"], r"--trainer\.callbacks: Expected a path but Nonsense"),
        (["--trainer.devices", "0"], r"--trainer\.devices 0 was given"),
        (
            ["--trainer.limit_val_batches", "0.001", "--trainer.max_epochs", "1"],
            r"limit_val_batches 0\.001 of 63 batch",
        ),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=probe/map"],
            r"EarlyStopping monitors 'probe/map', which nothing in this run logs: did you mean 'probe/mAP'",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_command_ends_in_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *SMALL, *words]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(f"mlssl: error: .*{said}", line), line
    assert len(line) < 400
    assert not list(tmp_path.glob("runs/*/checkpoints/*"))


def test_other_refusals_of_the_trainer_are_reported_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @wraps(Trainer.fit)
    def refuse(*_: Any, **__: Any) -> None:
        raise MisconfigurationException("No such thing.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", refuse)
    assert main(["fit", *SMALL]) == 2
    assert "The Trainer refuses its settings (No such thing): change" in capsys.readouterr().err

    @wraps(Trainer.fit)
    def stop(*_: Any, **__: Any) -> None:
        raise RuntimeError("Early stopping conditioned on metric `a` which is not available. … following: `b`")

    monkeypatch.setattr("lightning.pytorch.Trainer.fit", stop)
    assert main(["fit", *SMALL]) == 2
    assert "A callback monitors 'a', which nothing in this run logged: pass one of b." in capsys.readouterr().err


def test_the_nearest_setting_is_suggested_for_a_misspelt_one() -> None:
    message = "Option 'model.bse_lr' is not accepted"
    assert plain_message(message, "fit", ["model.base_lr"]) == (
        "there is no setting 'model.bse_lr', did you mean 'model.base_lr'? `mlssl fit --help_all` lists them"
    )
    assert plain_message("Something\n  else", "fit", []) == "Something else"
