"""A run's folder, and the defaults of its Trainer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import WandbLogger

from mlssl.callbacks import BackboneExport, CollapseMonitor, OnlineLinearProbe, RandomState, RunBar, SmallMaps
from mlssl.checkpoint import AtomicCheckpointIO, RunCheckpoint
from mlssl.metrics_file import MetricsFile
from mlssl.runs import RUN_FOLDER_VARIABLE, default_precision, is_first_process, new_run_folder, run_settings


@pytest.fixture(autouse=True)
def _no_run_folder_in_the_environment(monkeypatch):
    monkeypatch.delenv(RUN_FOLDER_VARIABLE, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    yield
    monkeypatch.delenv(RUN_FOLDER_VARIABLE, raising=False)


def test_a_run_folder_is_new_and_named_by_the_run_and_the_time(tmp_path):
    folder = new_run_folder(tmp_path / "runs", "coco")
    assert folder.is_dir()
    assert re.fullmatch(r"coco-\d{8}-\d{6}", folder.name)


def test_runs_in_the_same_second_get_separate_folders(tmp_path):
    folders = {new_run_folder(tmp_path) for _ in range(5)}
    assert len(folders) == 5


def test_the_other_processes_of_a_run_get_the_folder_of_the_first(tmp_path, monkeypatch):
    first = new_run_folder(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert new_run_folder(tmp_path) == first


def test_the_first_process_is_known_from_the_launchers_variables(monkeypatch):
    for name in ("RANK", "NODE_RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert is_first_process()
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "OMPI_COMM_WORLD_RANK"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert not is_first_process()


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        new_run_folder(tmp_path / "file")


def test_names_that_are_all_taken_are_an_error(tmp_path, monkeypatch):
    def taken(self, **kwargs):
        raise FileExistsError(self)

    monkeypatch.setattr(Path, "mkdir", taken)
    with pytest.raises(OSError, match="pass another name or another runs folder"):
        new_run_folder(tmp_path)


def test_missing_settings_are_added(tmp_path):
    settings = run_settings(tmp_path, {"max_epochs": 3})
    assert settings["max_epochs"] == 3
    assert settings["default_root_dir"] == str(tmp_path)
    assert settings["precision"] == default_precision("auto")
    assert Path(settings["logger"][0].log_dir) == tmp_path
    kinds = [type(callback) for callback in settings["callbacks"]]
    assert {OnlineLinearProbe, CollapseMonitor, BackboneExport, RandomState, RunCheckpoint} <= set(kinds)
    assert [type(plugin) for plugin in settings["plugins"]] == [AtomicCheckpointIO]


def test_a_probe_of_another_network_does_not_replace_that_of_the_backbone(tmp_path):
    other = OnlineLinearProbe()
    other.network = "teacher"
    callbacks = run_settings(tmp_path, {"callbacks": [other]})["callbacks"]
    assert len([callback for callback in callbacks if isinstance(callback, OnlineLinearProbe)]) == 2


@pytest.mark.parametrize(
    ("gpu", "accelerator", "added"), [(False, None, True), (True, "cpu", True), (True, None, False)]
)
def test_small_maps_are_products_only_on_a_cpu(tmp_path, monkeypatch, gpu, accelerator, added):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    settings = {} if accelerator is None else {"accelerator": accelerator}
    callbacks = run_settings(tmp_path, settings)["callbacks"]
    assert any(isinstance(callback, SmallMaps) for callback in callbacks) == added


def test_the_users_settings_are_kept_and_metrics_csv_is_added(tmp_path):
    probe, saver, board = OnlineLinearProbe(lr=0.1), ModelCheckpoint(), WandbLogger(save_dir=tmp_path, offline=True)
    given = {"callbacks": [probe, saver], "logger": board, "precision": "32-true", "log_every_n_steps": 7}
    settings = run_settings(tmp_path, given)
    assert given["callbacks"] == [probe, saver]
    assert [callback for callback in settings["callbacks"] if isinstance(callback, OnlineLinearProbe)] == [probe]
    assert [callback for callback in settings["callbacks"] if type(callback) is ModelCheckpoint] == [saver]
    assert [type(logger) for logger in settings["logger"]] == [MetricsFile, WandbLogger]
    assert settings["precision"] == "32-true"
    assert settings["log_every_n_steps"] == 7


@pytest.mark.parametrize("logger", [None, True, False])
def test_metrics_csv_is_written_with_any_logger(tmp_path, logger):
    assert [type(one) for one in run_settings(tmp_path, {"logger": logger})["logger"]] == [MetricsFile]


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, 10),
        ({"limit_train_batches": 3}, 3),
        ({"limit_train_batches": 3.0}, 3),
        ({"limit_train_batches": 1}, 1),
        ({"limit_train_batches": 1.0}, 10),
        ({"limit_train_batches": 0.5}, 10),
        ({"max_steps": 4}, 4),
        ({"max_steps": -1}, 10),
    ],
)
def test_a_short_run_is_logged_too(tmp_path, given, steps):
    assert run_settings(tmp_path, given)["log_every_n_steps"] == steps


def test_no_checkpoint_is_saved_if_checkpointing_is_off(tmp_path):
    callbacks = run_settings(tmp_path, {"enable_checkpointing": False})["callbacks"]
    assert not any(isinstance(callback, ModelCheckpoint) for callback in callbacks)


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "precision"),
    [(True, False, "bf16-mixed"), (False, True, "bf16-mixed"), (False, False, "32-true")],
)
def test_bfloat16_is_chosen_if_the_cpu_has_it(monkeypatch, avx512_bf16, amx, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert default_precision() == precision


def test_an_unused_gpu_does_not_affect_the_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert default_precision("cpu") == "32-true"
    assert default_precision("auto") == "bf16-mixed"


@pytest.mark.parametrize(("supported", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_bfloat16_is_chosen_if_the_gpu_has_it(monkeypatch, supported, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert default_precision() == precision


# ---------------------------------------------------------------------- what a run resumes from


def test_a_checkpoint_callback_of_the_user_saves_in_addition_and_does_not_write_last_ckpt(tmp_path):
    best = ModelCheckpoint(monitor="probe/mAP", mode="max", save_last=True)
    elsewhere = ModelCheckpoint(dirpath=tmp_path / "elsewhere", save_last=True, every_n_train_steps=5)
    savers = [
        one
        for one in run_settings(tmp_path, {"callbacks": [best, elsewhere]})["callbacks"]
        if isinstance(one, ModelCheckpoint)
    ]
    assert savers[:2] == [best, elsewhere]
    assert [type(one) for one in savers[2:]] == [RunCheckpoint]
    assert [Path(one.dirpath) for one in savers] == [
        tmp_path / "checkpoints",
        tmp_path / "elsewhere",
        tmp_path / "checkpoints",
    ]
    assert [one.CHECKPOINT_NAME_LAST for one in savers] == ["last_of_callback", "last", "last"]


@pytest.mark.parametrize(("settings", "count"), [({}, 1), ({"every_n_epochs": 1}, 1), ({"every_n_train_steps": 5}, 2)])
def test_a_run_checkpoint_of_the_user_replaces_the_librarys_if_it_saves_at_the_same_times(tmp_path, settings, count):
    own = RunCheckpoint(save_last=True, **settings)
    callbacks = run_settings(tmp_path, {"callbacks": [own]})["callbacks"]
    assert len([one for one in callbacks if isinstance(one, RunCheckpoint)]) == count


@pytest.mark.parametrize(
    "settings", [{}, {"save_last": True, "save_weights_only": True}, {"save_last": True, "dirpath": "elsewhere"}]
)
def test_a_run_checkpoint_that_saves_nothing_to_resume_from_is_refused(tmp_path, settings):
    with pytest.raises(ValueError, match=r"A RunCheckpoint with save_last=.* was given, but a run resumes from the"):
        run_settings(tmp_path, {"callbacks": [RunCheckpoint(**settings)]})


def test_a_run_has_one_bar_unless_the_user_has_another_or_none(tmp_path: Path) -> None:
    def bars(**settings: Any) -> list[type]:
        callbacks = run_settings(tmp_path, settings)["callbacks"]
        return [type(callback) for callback in callbacks if isinstance(callback, ProgressBar)]

    assert bars() == [RunBar]
    assert bars(callbacks=[TQDMProgressBar()]) == [TQDMProgressBar]
    assert bars(enable_progress_bar=False) == []
    assert run_settings(tmp_path, {})["enable_model_summary"] is False
    assert run_settings(tmp_path, {"enable_model_summary": True})["enable_model_summary"] is True
