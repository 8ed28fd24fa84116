"""One run of several processes: one folder, written only by the first, with any launcher and any start times."""

from __future__ import annotations

import csv
import os
import re
import socket
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch
from _gloo import Processes
from PIL import Image

import mlssl.runs
from mlssl.distributed import rank
from mlssl.runs import RUN_FOLDER_VARIABLE, new_run_folder

SMALL = [
    *("--model.backbone", "test_resnet", "--model.projection_dim", "16", "--model.predictor_dim", "8"),
    *("--trainer.accelerator", "cpu", "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.precision", "32-true", "--trainer.log_every_n_steps", "1", "--trainer.num_sanity_val_steps", "0"),
    *("--data.batch_size", "4", "--data.size", "32", "--data.eval_size", "32", "--data.num_workers", "0"),
    *("--trainer.strategy", "ddp", "--trainer.max_epochs", "1"),
]
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "{rank}", "WORLD_SIZE": "2", "LOCAL_RANK": "{rank}"}
SRUN = {
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_JOB_NAME": "pretrain",
    "SLURM_PROCID": "{rank}",
    "SLURM_NODEID": "{rank}",
    "SLURM_LOCALID": "0",
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def filled(variables: dict[str, str], number: int, port: int) -> dict[str, str]:
    own = {name: value.format(rank=number) for name, value in variables.items()}
    return own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


# ---------------------------------------------------------------------- the folder


def folders_made(variables: dict[str, str], port: int, parent: Path, seconds: int) -> list[str]:
    """Two folders, with a clock that is `seconds` ahead in each process after the first."""

    class Clock(datetime):
        @classmethod
        def now(cls) -> datetime:  # type: ignore[override]
            return datetime(2030, 1, 1) + timedelta(seconds=seconds * rank())

    with pytest.MonkeyPatch.context() as patch:
        for name, value in filled(variables, rank(), port).items():
            patch.setenv(name, value)
        patch.setenv(RUN_FOLDER_VARIABLE, "runs/of-another-run")
        patch.setattr(mlssl.runs, "datetime", Clock)
        return [str(new_run_folder(parent, name)) for name in ("fit", "knn")]


@pytest.mark.parametrize("seconds", [0, 7])
@pytest.mark.parametrize("variables", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_all_processes_use_the_folder_of_the_first(
    variables: dict[str, str], seconds: int, tmp_path: Path, processes: Processes
) -> None:
    (tmp_path / "fit-20300101-000000").mkdir()  # of an earlier run
    first, second = processes.run(folders_made, variables, free_port(), tmp_path, seconds)
    assert first == second == [str(tmp_path / "fit-20300101-000000-2"), str(tmp_path / "knn-20300101-000000")]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_silent_first_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    for name, value in filled(TORCHRUN, 1, port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mlssl.runs, "_MAX_WAIT", timedelta(seconds=1))
    with pytest.raises(OSError, match=rf"first process of the run, at 127.0.0.1:{port}, did not send its folder to"):
        new_run_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_script_without_srun_in_a_job_of_several_tasks_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in filled(SRUN, 0, free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    monkeypatch.setattr(mlssl.runs, "_from_first_process", None)
    assert new_run_folder(tmp_path).is_dir()


# ---------------------------------------------------------------------- mlssl fit


def started(words: list[str], where: Path, *, program: str = sys.executable, **variables: str) -> subprocess.Popen[str]:
    where.mkdir(exist_ok=True)
    others = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "WANDB_", "MLSSL_RUN"))}
    settings = {"OMP_NUM_THREADS": "1", "WANDB_SILENT": "true", "HOME": f"{where} home", "PYTHONFAULTHANDLER": "1"}
    return subprocess.Popen(
        [program, *words],
        cwd=where,
        env={**others, **settings, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def by_torchrun(words: list[str], port: int = 0, node: int = 0, nodes: int = 1, devices: int = 2) -> list[str]:
    place = [f"--nnodes={nodes}", f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"]
    launcher = ["-m", "torch.distributed.run", *(place if nodes > 1 else ["--standalone"])]
    return [*launcher, f"--nproc_per_node={devices}", "-m", "mlssl.cli", *words]


def ended_well(*running: subprocess.Popen[str]) -> list[str]:
    """Their output."""
    printed = []
    for process in running:
        try:
            printed.append(process.communicate(timeout=300)[0])
        finally:
            process.kill()
        assert process.returncode == 0, printed[-1]
    return printed


def steps_logged(folder: Path) -> list[int]:
    with (folder / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]


def assert_whole(folder: Path) -> None:
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert {"config.yaml", "metrics.csv", "checkpoints/last.ckpt", "exports/backbone.safetensors"} <= names
    assert sum(name.startswith("views/") for name in names) == 4
    assert steps_logged(folder) == [0, 1, 2]
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["random_state"]["cpu"].shape[0] == 2  # one of each process
    assert (saved["global_step"], saved["MultiLabelDataModule"]["images_per_step"]) == (3, 8)


@pytest.mark.thorough
def test_a_run_by_torchrun_is_one_run_in_weights_and_biases_and_resumes_as_one(tmp_path: Path) -> None:
    logger = ["--trainer.logger", "WandbLogger", "--trainer.logger.offline", "true"]
    words = ["fit", *SMALL, "--trainer.devices", "2", *logger]
    ended_well(started(by_torchrun(words), tmp_path))
    (folder,) = (tmp_path / "runs").iterdir()
    assert_whole(folder)
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    more = ["fit", "--resume", str(folder), "--trainer.max_epochs", "2"]
    ended_well(started(by_torchrun(more), tmp_path))
    assert [one.name for one in (tmp_path / "runs").iterdir()] == [folder.name]
    assert steps_logged(folder) == [0, 1, 2, 3, 4, 5]
    runs = [one.name for one in folder.glob("wandb/offline-run-*")]
    assert (len(runs), len({name.rpartition("-")[2] for name in runs})) == (2, 1)
    assert not list(tmp_path.glob("wandb*"))


@pytest.mark.thorough
@pytest.mark.parametrize("starter", ["torchrun", "srun"])
def test_two_nodes_are_one_run_with_files_written_by_the_first(starter: str, tmp_path: Path) -> None:
    """Each node works in a separate folder, as without a shared disk."""
    words = ["fit", *SMALL, "--trainer.devices", "1", "--trainer.num_nodes", "2"]
    port, running = free_port(), []
    for node in (0, 1):
        where = tmp_path / f"node {node}"
        if starter == "torchrun":
            running.append(started(by_torchrun(words, port, node, nodes=2, devices=1), where))
        else:
            running.append(started(["-m", "mlssl.cli", *words], where, **filled(SRUN, node, port)))
    _, printed = ended_well(*running)
    (folder,) = (tmp_path / "node 0" / "runs").iterdir()
    assert_whole(folder)
    assert not list((tmp_path / "node 1").rglob("*")), printed


@pytest.mark.thorough
def test_a_file_that_is_removed_ends_all_processes_and_is_named_with_its_rank(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(16):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(photos / f"{number}.png")
    words = ["fit", *SMALL, "--trainer.devices", "2", "--trainer.max_epochs", "1000"]
    words += ["--trainer.limit_train_batches", "2", "--data.dataset", "folder", "--data.root", str(photos)]
    running = started(by_torchrun(words), tmp_path)
    try:
        while not list(tmp_path.glob("runs/*/metrics.csv")):
            assert running.poll() is None, running.communicate()[0]
            time.sleep(0.2)
        for path in photos.iterdir():
            path.unlink()
        printed = running.communicate(timeout=120)[0]
    finally:
        running.kill()
    assert running.returncode != 0
    said = rf"mlssl: error: .*{photos}/\d+\.png' on rank [01], in step \d+ of epoch \d+: check this file"
    assert re.search(said, printed), printed


@pytest.mark.thorough
def test_a_run_by_torchrun_saves_on_sigterm_and_resumes(tmp_path: Path) -> None:
    words = ["fit", *SMALL, "--trainer.devices", "2", "--trainer.max_epochs", "1000"]
    running = started(by_torchrun(words), tmp_path)
    try:
        while not list(tmp_path.glob("runs/*/checkpoints/last.ckpt")):
            assert running.poll() is None, running.communicate()[0]
            time.sleep(0.2)
        running.terminate()
        printed = running.communicate(timeout=60)[0]
    finally:
        running.kill()
    (folder,) = (tmp_path / "runs").iterdir()
    assert printed.count(f"to resume: mlssl fit --resume runs/{folder.name}") == 2
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    steps = saved["global_step"]
    assert [*range(steps)] == steps_logged(folder)
    more = ["fit", "--resume", str(folder), "--trainer.max_epochs", str(steps // 3 + 2)]
    ended_well(started(by_torchrun(more), tmp_path))
    assert [*range(3 * (steps // 3 + 2))] == steps_logged(folder)
