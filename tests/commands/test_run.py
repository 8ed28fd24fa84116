"""A run's folder, its loggers, its resume, and the errors of `mlssl fit` for wrong words."""

from __future__ import annotations

import csv
import errno
import json
import logging
import os
import re
import shutil
import signal
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import get_worker_info
from wandb.proto.wandb_internal_pb2 import Record

import mlssl.atomic
from mlssl.callbacks import StepMemory
from mlssl.cli import main
from mlssl.data.records import Records
from mlssl.locks import locked
from mlssl.module import MultiLabelSSLModule
from mlssl.run_folder import read_log
from mlssl.runs import RUN_FOLDER_VARIABLE, logger_in_folder

MODEL = ["--model.backbone", "test_resnet", "--model.projection_dim", "16", "--model.predictor_dim", "8"]
TRAINER = [
    *("--trainer.accelerator", "cpu", "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.precision", "32-true", "--trainer.log_every_n_steps", "1", "--trainer.num_sanity_val_steps", "0"),
]
DATA = ["--data.batch_size", "8", "--data.size", "32", "--data.eval_size", "32", "--data.num_workers", "0"]
SMALL = [*MODEL, *TRAINER, *DATA]
SCALARS = {
    *("train/loss", "train/pair_loss", "train/image_aware_loss", "probe/mAP", "collapse/std", "collapse/rank"),
    *("time/data", "time/step", "throughput/images_per_s"),
}


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for name in (RUN_FOLDER_VARIABLE, "PL_GLOBAL_SEED", "PL_SEED_WORKERS", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    yield
    wandb.teardown()


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of one epoch without any logger."""
    folder = tmp_path_factory.mktemp("one_epoch")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in (RUN_FOLDER_VARIABLE, "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "")
        return (folder / fit("--trainer.max_epochs", "1", "--trainer.logger", "false")).resolve()


@pytest.fixture
def run(one_epoch: Path) -> Path:
    """A copy of that run, to resume."""
    return shutil.copytree(one_epoch, Path("runs") / one_epoch.name)


def fit(*words: str) -> Path:
    """Folder of a finished run."""
    before = set(Path("runs").glob("*"))
    assert main(["fit", *SMALL, *words]) == 0
    (folder,) = set(Path("runs").glob("*")) - before
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [
            {name: value for name, value in row.items() if value and not name.startswith(("time/", "throughput/"))}
            for row in csv.DictReader(file)
        ]


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


# ---------------------------------------------------------------------- Weights & Biases, TensorBoard, none


def records_of(path: Path) -> Iterator[Any]:
    """Records of a .wandb file: LevelDB's log format, a header of 7 bytes, protobuf inside."""
    block, content = 32768, path.read_bytes()
    assert content[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(content):
        if block - position % block < 7:
            position += block - position % block
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


@pytest.mark.slow
def test_a_run_in_weights_and_biases_contains_scalars_pictures_config_and_summary(tmp_path: Path) -> None:
    words = ["--trainer.logger", "WandbLogger", "--trainer.logger.offline", "true", "--trainer.logger.project", "shelf"]
    folder = fit("--name", "shelf", "--trainer.max_epochs", "2", *words)
    wandb.teardown()  # waits until the service has written everything
    assert not (tmp_path / "wandb").exists()
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    found: dict[str, list[Any]] = {"run": [], "history": [], "summary": [], "config": []}
    for record in records_of(path):
        kind = record.WhichOneof("record_type")
        if kind in found:
            found[kind].append(getattr(record, kind))
    assert {(run.project, run.display_name) for run in found["run"]} == {("shelf", folder.name)}

    logged: dict[str, list[Any]] = {}
    for history in found["history"]:
        for item in history.item:
            logged.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    assert logged.keys() >= SCALARS
    assert len(logged["train/loss"]) == 6
    assert len(logged["probe/mAP"]) == 2
    assert logged["train/loss"] == [float(row["train/loss"]) for row in rows(folder) if "train/loss" in row]
    pictures = [values[0] for name, values in logged.items() if name.startswith("views/") and "filenames" in name]
    assert len(pictures) == 4
    for (file,) in pictures:
        assert (path.parent / "files" / file).read_bytes()[:4] == b"\x89PNG"

    config = {}
    for one in [*(run.config for run in found["run"]), *found["config"]]:
        config |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in one.update}
    assert (config["projection_dim"], config["batch_size"], config["seed_everything"]) == (16, 8, 0)
    assert config["trainer"]["max_epochs"] == 2
    summary = {}
    for one in found["summary"]:
        summary |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in one.update}
    assert summary["probe/best_mAP"] == max(logged["probe/mAP"])
    assert (summary["run/epochs"], summary["run/steps"], summary["run/folder"]) == (2, 6, str(folder))
    assert summary == {**summary, **json.loads((folder / "summary.json").read_text())}

    assert main(["fit", "--resume", str(folder), "--trainer.max_epochs", "3"]) == 0
    ids = {one.name.rsplit("-", 1)[1] for one in folder.glob("wandb/offline-run-*")}
    assert len(ids) == 1
    assert len(list(Path("runs").iterdir())) == 1


def test_tensorboard_gets_the_same_entries(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator as accumulator  # takes seconds

    words = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "."]
    folder = fit("--trainer.max_epochs", "1", *words)
    events = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) >= SCALARS
    assert sum(tag.startswith("views/") for tag in tags["images"]) == 4
    assert {"config/text_summary", "summary/text_summary"} <= set(tags["tensors"])
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(
        [float(row["train/loss"]) for row in rows(folder) if "train/loss" in row]
    )


def test_a_logger_with_its_own_folder_keeps_it(tmp_path: Path) -> None:
    logger = WandbLogger(save_dir="elsewhere", offline=True)
    assert logger_in_folder(logger, {"save_dir": "elsewhere"}, tmp_path) is logger


def test_without_a_login_the_error_names_the_offline_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *SMALL, "--trainer.max_epochs", "1", "--trainer.logger", "WandbLogger"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("mlssl: error: Weights & Biases refused the run (")
    assert line.endswith(
        "log in with `wandb login`, or pass --trainer.logger.offline true and send it later with `wandb sync`."
    )
    assert not list(Path("runs").rglob("*.ckpt"))


# ---------------------------------------------------------------------- resume


@pytest.mark.slow
def test_a_stopped_run_resumes_as_if_uninterrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit("--name", "whole", "--trainer.max_epochs", "2")
    step = MultiLabelSSLModule.training_step

    def fails(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 5:
            raise OSError("the machine went away")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(MultiLabelSSLModule, "training_step", fails)
        assert main(["fit", *SMALL, "--name", "cut", "--trainer.max_epochs", "2"]) == 2
    (cut,) = Path("runs").glob("cut-*")
    config = (cut / "config.yaml").read_text()
    assert len(rows(cut)) == 6  # two steps of the second epoch are after its last checkpoint
    assert main(["fit", "--resume", str(cut)]) == 0
    assert rows(cut) == rows(whole)
    first, second = last_weights(whole), last_weights(cut)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (cut / "config.yaml").read_text() == config
    assert not list(cut.glob("config-before-*"))


def test_a_run_without_a_logger_is_not_an_error(one_epoch: Path) -> None:
    assert read_log(one_epoch).keys() >= SCALARS


def test_a_run_resumes_for_more_epochs_and_nothing_is_lost(run: Path) -> None:
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.suffix in (".png", ".csv")}
    export = (run / "exports" / "backbone.safetensors").read_bytes()
    assert main(["fit", "--resume", str(run), "--trainer.max_epochs", "3"]) == 0
    assert [path.name for path in Path("runs").iterdir()] == [run.name]
    assert {row["epoch"] for row in rows(run)} == {"0", "1", "2"}
    assert (run / "metrics.csv").read_bytes().startswith(files.pop(run / "metrics.csv"))
    assert all(path.read_bytes() == content for path, content in files.items())
    assert (run / "exports" / "backbone.safetensors").read_bytes() == export
    assert (run / "exports" / "backbone-v1.safetensors").exists()
    settings, before = (yaml.safe_load((run / name).read_text()) for name in ("config.yaml", "config-before-1.yaml"))
    assert (settings["trainer"].pop("max_epochs"), before["trainer"].pop("max_epochs")) == (3, 1)
    assert settings == before
    assert settings["ckpt_path"] is None  # run again, it starts from the beginning


def steps_of_last(folder: Path) -> int:
    return int(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])


@pytest.mark.slow
def test_a_moved_copied_or_linked_run_resumes_from_its_newest_checkpoint(run: Path) -> None:
    folders = [shutil.copytree(run, Path("copied")), run.rename("moved"), Path("linked")]
    folders[2].symlink_to("moved")
    logged = {name: [row["step"] for row in rows(Path(name))] for name in ("moved", "copied")}
    for epochs, path in ((2, Path("moved")), (3, Path("linked")), (4, Path("moved").resolve())):
        assert main(["fit", "--resume", str(path), "--trainer.max_epochs", str(epochs)]) == 0
        assert sorted(file.name for file in Path("moved/checkpoints").iterdir()) == [
            f"epoch={epochs - 1}-step={3 * epochs}.ckpt",
            "last.ckpt",
        ]
        assert steps_of_last(Path("moved")) == 3 * epochs
    assert len(rows(Path("moved"))) == 4 * len(logged["moved"])
    assert [row["step"] for row in rows(Path("copied"))] == logged["copied"]
    assert steps_of_last(Path("copied")) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["--trainer.max_steps", "4"], ["--trainer.max_steps", "8"]),  # cut in the second epoch
        (["--trainer.max_steps", "3"], ["--trainer.max_steps", "8"]),  # cut at its end
        (["--trainer.max_epochs", "1"], ["--trainer.max_epochs", "3"]),
    ],
)
def test_an_extended_run_continues_as_one_that_was_as_long_from_the_start(
    before: list[str], after: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step, seen = MultiLabelSSLModule.training_step, []

    def looks(self: Any, batch: Any, batch_idx: int) -> Any:
        rates = [group["lr"] for group in self.optimizers().param_groups]
        seen.append((self.global_step, self.current_epoch, batch["image_ids"].tolist(), rates))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(MultiLabelSSLModule, "training_step", looks)
    monkeypatch.setattr(StepMemory, "on_fit_start", lambda *_: None)  # runs extra steps
    whole = fit("--name", "whole", *after)
    expected = list(seen)
    seen.clear()
    cut = fit("--name", "cut", *before)
    first = len(seen)
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    assert main(["fit", "--resume", str(cut), *after]) == 0
    total = len(expected)
    assert f"The run was {first} steps long and is now {total}: from step {first} its learning rates" in caplog.text
    assert [one[:3] for one in seen] == [one[:3] for one in expected]
    assert seen[first:] == expected[first:]
    steps = [[(row["step"], row["epoch"]) for row in rows(run) if "train/loss" in row] for run in (whole, cut)]
    assert steps[0] == steps[1]
    assert [int(one[0]) for one in steps[0]] == [*range(total)]


def test_a_run_locked_by_another_process_is_refused_and_not_changed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with locked(run / ".run.lock", "the run", wait=False):
        assert main(["fit", "--resume", str(run), "--trainer.max_epochs", "3"]) == 2
    said = f"the run {run} is in use by process {os.getpid()} on {socket.gethostname()}: wait until it has ended, or"
    assert said in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_is_locked_while_it_trains_and_leftovers_of_killed_runs_are_removed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (
        "checkpoints/.last.0a1b2c3d.ckpt",
        "checkpoints/.epoch=1-step=6.0a1b2c3d.ckpt",
        ".metrics.0a1b2c3d.csv",
    ):
        (run / name).write_bytes(bytes(500_000))
    step, seen = MultiLabelSSLModule.training_step, []

    def looks(self: Any, batch: Any, batch_idx: int) -> Any:
        with pytest.raises(OSError, match="is in use by process"), locked(run / ".run.lock", "it", wait=False):
            pass
        seen.append([path.name for path in run.rglob(".*")])
        return step(self, batch, batch_idx)

    monkeypatch.setattr(MultiLabelSSLModule, "training_step", looks)
    monkeypatch.setattr(StepMemory, "on_fit_start", lambda *_: None)  # runs extra steps
    assert main(["fit", "--resume", str(run), "--trainer.max_epochs", "2"]) == 0
    assert seen == [[".run.lock"]] * 3
    assert "removed 1.5 MB of half-written files of a killed run" in capsys.readouterr().out
    assert not list(run.rglob(".*"))


@pytest.mark.slow
def test_a_callback_for_the_best_checkpoint_saves_in_addition_also_after_a_move(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("run.yaml").write_text(
        "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: "
        "{monitor: probe/mAP, mode: max, filename: best, save_last: true}}]}\n"
    )
    folder = fit("--config", "run.yaml", "--trainer.max_epochs", "1", "--trainer.logger", "false")
    files = sorted(file.name for file in (folder / "checkpoints").iterdir())
    assert files == ["best.ckpt", "last.ckpt", "last_of_callback.ckpt", "run-epoch=0-step=3.ckpt"]
    summary = json.loads((folder / "summary.json").read_text())
    assert Path(summary["run/checkpoint"]).name == "last.ckpt"
    assert Path(summary["run/best_checkpoint"]).name == "best.ckpt"

    step = MultiLabelSSLModule.training_step
    for came, signum in ((4, signal.SIGTERM), (7, signal.SIGINT)):

        def sends(self: Any, batch: Any, batch_idx: int, came: int = came, signum: int = signum) -> Any:
            if self.global_step == came:
                os.kill(os.getpid(), signum)
            return step(self, batch, batch_idx)

        folder = folder.rename(f"moved-{came}")
        with monkeypatch.context() as patch:
            patch.setattr(MultiLabelSSLModule, "training_step", sends)
            assert main(["fit", "--resume", str(folder), "--trainer.max_epochs", "3"]) == 130
        assert steps_of_last(folder) == came + 1
    assert main(["fit", "--resume", str(folder), "--trainer.max_epochs", "3"]) == 0
    assert steps_of_last(folder) == 9
    scores = {
        name: state["best_model_score"]
        for name, state in torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"].items()
        if "probe/mAP" in name
    }
    best = max(float(row["probe/mAP"]) for row in rows(folder) if "probe/mAP" in row)
    assert [float(score) for score in scores.values()] == [pytest.approx(best)]
    assert not [file.name for file in (folder / "checkpoints").iterdir() if "-v" in file.name]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["fit", "--resume", "runs/none"],
            "There is no run at runs/none: pass the folder of one, --resume runs/NAME-<",
        ),
        (["fit", "--resume", "."], ". cannot be resumed, it has no config.yaml: pass the folder of a run that saved a"),
        (["fit", "--resume"], "--resume was given without a value: pass the folder of a run"),
        (["test", "--resume", "runs/none"], "--resume is for fit, but test was given: pass --ckpt_path"),
    ],
)
def test_a_run_that_cannot_be_resumed_is_reported(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert f"mlssl: error: {message}" in capsys.readouterr().err


# ---------------------------------------------------------------------- wrong words, wrong places


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.backbon", "resnet18"], "there is no setting 'model.backbon', did you mean 'model.backbone'?"),
        (["--trainer.max_epoch", "1"], "there is no setting 'trainer.max_epoch', did you mean 'trainer.max_epochs'?"),
        (["--zzz", "1"], "there is no setting 'zzz': `mlssl fit --help_all` lists them"),
        (["--config", "wrong.yaml"], "there is no setting 'data.overlapp', did you mean 'data.overlap'? `mlssl fit"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--model.projection_dim", "wide"], "--model.projection_dim takes a whole number, and wide was given"),
    ],
)
def test_the_nearest_setting_is_suggested(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("wrong.yaml").write_text("data:\n  overlapp: 0.3\n")
    assert main(["fit", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("mlssl: error: ")
    assert message in line


def test_a_checkpoint_of_another_architecture_is_reported_in_one_line(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        (["--resume", str(run)], "The checkpoint does not fit this module: projection_dim=16 there, 32 here. Build"),
        (
            ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")],
            "The checkpoint has another architecture, projection_dim=16, but 32 was given: leave out the setting",
        ),
    ):
        assert main(["fit", *words, *SMALL, "--model.projection_dim", "32", "--trainer.max_epochs", "2"]) == 2
        assert f"mlssl: error: {message}" in capsys.readouterr().err


def test_a_path_where_no_folder_can_be_created_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    assert main(["fit", *SMALL, "--runs", "file/runs"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot be created for the run" in line
    assert "pass another folder, --runs FOLDER, or check its permissions" in line


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="permissions of this kind are those of POSIX")
def test_a_path_without_permission_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as locked:  # readable by other users, unlike tmp_path
        Path(locked).chmod(0o555)
        try:
            if root:  # root may write anywhere
                os.seteuid(65534)
            assert main(["fit", *SMALL, "--runs", str(Path(locked) / "runs")]) == 2
        finally:
            if root:
                os.seteuid(0)
            Path(locked).chmod(0o755)
    assert "cannot be created for the run (Permission denied): pass another folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dead_worker_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_a_worker_die(records: Records, index: int) -> Any:
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return records.decode(records.path(index))

    monkeypatch.setattr(Records, "image", in_a_worker_die)  # forked workers inherit it
    words = ("--data.num_workers", "1", "--data.val_split", "", "--trainer.max_epochs", "1")
    assert main(["fit", *SMALL, *words, "--trainer.logger", "false"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        r"mlssl: error: No batch came on rank 0: worker \d+ was killed by SIGKILL\. Step 0 of epoch 0 ", said
    )


def test_a_full_disk_leaves_the_last_checkpoint_intact_and_is_reported(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {path: path.read_bytes() for path in [*run.rglob("*.ckpt"), *run.rglob("*.safetensors")]}
    flush = mlssl.atomic._flush

    def full(path: Path) -> None:
        if path.suffix == ".ckpt":
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    monkeypatch.setattr(mlssl.atomic, "_flush", full)
    assert main(["fit", "--resume", str(run), "--trainer.max_epochs", "2"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device: '" in line
    assert line.endswith(".ckpt': nothing new was kept, and an existing file is intact; free some space")
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert not [path for path in run.rglob(".*") if path.is_file()]
