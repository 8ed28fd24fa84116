"""A run in a SLURM job that runs out of time: saved, requeued, resumed with the same result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from _toy import OwnData, small
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from test_processes_of_a_run import SMALL, free_port

from mlssl.checkpoint import RunCheckpoint
from mlssl.requeue import Requeue, requeue_job

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "engines" / "slurm.sbatch"


def executable(path: Path, *lines: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    path.chmod(0o755)


@pytest.fixture
def requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a stand-in for scontrol was asked for, in a job of number 77."""
    asked = tmp_path / "asked"
    executable(tmp_path / "bin" / "scontrol", f'echo "$@" >> {asked}')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    return asked


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    yield
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


class SignalAt(L.Callback):
    def __init__(self, number: signal.Signals, batch: int) -> None:
        self.number, self.batch = number, batch

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.batch:
            signal.raise_signal(self.number)


def trainer_of_a_job(folder: Path, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, RunCheckpoint(folder, save_last=True)],
        **{"plugins": [SLURMEnvironment()], **settings},
    )


def test_the_signal_ends_the_run_after_its_step_and_requeues_the_job(tmp_path: Path, requests: Path) -> None:
    trainer = trainer_of_a_job(tmp_path, SignalAt(signal.SIGUSR1, 2))
    with pytest.raises(SIGTERMException):
        trainer.fit(small(), OwnData())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
    assert requests.read_text() == "requeue 77\n"
    assert not list(tmp_path.glob("hpc_ckpt*")), "Lightning saved in the middle of the step"
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_sigterm_does_not_requeue(tmp_path: Path, requests: Path) -> None:
    trainer = trainer_of_a_job(tmp_path, SignalAt(signal.SIGTERM, 2))
    with pytest.raises(SIGTERMException):
        trainer.fit(small(), OwnData())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
    assert not requests.exists()


def test_another_signal_can_be_chosen(tmp_path: Path, requests: Path) -> None:
    plugins = [SLURMEnvironment(requeue_signal=signal.SIGUSR2)]
    trainer = trainer_of_a_job(tmp_path, SignalAt(signal.SIGUSR2, 1), plugins=plugins)
    with pytest.raises(SIGTERMException):
        trainer.fit(small(), OwnData())
    assert requests.read_text() == "requeue 77\n"
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL


@pytest.mark.parametrize("plugins", [[], [SLURMEnvironment(auto_requeue=False)]], ids=["no SLURM", "turned off"])
def test_elsewhere_the_signal_is_left_alone(plugins: list[Any], tmp_path: Path) -> None:
    Requeue(trainer_of_a_job(tmp_path, plugins=plugins), lambda: None)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_custom_handler_stays(tmp_path: Path) -> None:
    came = []
    signal.signal(signal.SIGUSR1, lambda *_: came.append(1))
    trainer_of_a_job(tmp_path, SignalAt(signal.SIGUSR1, 2)).fit(small(), OwnData())
    assert came == [1]


def test_a_loader_worker_ignores_the_signal(tmp_path: Path) -> None:
    """It inherits the handler, and SLURM sends the signal to the whole group of processes."""
    came = tmp_path / "came"
    Requeue(trainer_of_a_job(tmp_path), came.touch)
    child = os.fork()
    if child == 0:
        signal.raise_signal(signal.SIGUSR1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert not came.exists()
    signal.raise_signal(signal.SIGUSR1)
    assert came.exists()


def test_a_task_of_an_array_is_requeued_by_its_own_number(requests: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    assert requeue_job() is None
    assert requests.read_text() == "requeue 70_7\n"


def test_a_refused_requeue_names_job_and_reason(
    tmp_path: Path, requests: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(tmp_path / "bin" / "scontrol", 'echo "Access/permission denied" >&2; exit 1')
    assert requeue_job() == (
        "SLURM does not requeue job '77' (Access/permission denied): submit a new job that resumes the run."
    )
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert "job '77' ([Errno 2] No such file or directory: 'scontrol')" in str(requeue_job())


def test_a_refused_requeue_keeps_the_checkpoint(tmp_path: Path, requests: Path) -> None:
    executable(tmp_path / "bin" / "scontrol", "exit 1")
    trainer = trainer_of_a_job(tmp_path, SignalAt(signal.SIGUSR1, 2))
    with pytest.warns(UserWarning, match="SLURM does not requeue job '77'"), pytest.raises(SIGTERMException):
        trainer.fit(small(), OwnData())
    assert (tmp_path / "last.ckpt").exists()


# ---------------------------------------------------------------------- the example, as a job of two tasks

TASKS = """
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 SLURM_STEP_NUM_TASKS=2 "$@" &
  echo $! >> pids
done
wait %1 && wait %2
"""
SCONTROL = """
echo "$@" >> asked
[ "$1 $2" = "requeue 77" ] && kill -TERM $(cat pids) 2>/dev/null
exit 0
"""


def job(where: Path, words: list[str], restarts: int) -> subprocess.Popen[str]:
    """The example as sbatch starts it, with stand-ins for srun and for scontrol, which ends the job as SLURM does."""
    executable(where / "bin" / "srun", TASKS)
    executable(where / "bin" / "scontrol", SCONTROL)
    executable(where / "bin" / "mlssl", f'exec {sys.executable} -m mlssl.cli "$@"')
    (where / "pids").unlink(missing_ok=True)
    slurm = {"JOB_ID": "77", "NTASKS": "2", "NTASKS_PER_NODE": "2", "NNODES": "1", "JOB_NAME": "pretrain"}
    variables = {f"SLURM_{name}": value for name, value in slurm.items()} | {"SLURM_RESTART_COUNT": str(restarts)}
    others = {name: value for name, value in os.environ.items() if not name.startswith(("PL_", "MLSSL_RUN"))}
    return subprocess.Popen(
        ["bash", str(EXAMPLE), *words],
        cwd=where,
        env={
            **{**others, **variables, "PATH": f"{where}/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_the_example_requeues_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    words = [*SMALL, "--trainer.max_epochs", "12"]
    interrupted, undisturbed = tmp_path / "interrupted", tmp_path / "undisturbed"
    interrupted.mkdir()
    undisturbed.mkdir()
    running = job(interrupted, words, 0)
    try:
        while not list(interrupted.glob("runs/77/*/checkpoints/last.ckpt")):
            assert running.poll() is None, running.communicate()[0]
            time.sleep(0.1)
        for pid in (interrupted / "pids").read_text().split():
            os.kill(int(pid), signal.SIGUSR1)
        printed = running.communicate(timeout=120)[0]
    finally:
        running.kill()
    assert running.returncode != 0
    assert (interrupted / "asked").read_text() == "requeue 77\n"
    (folder,) = (interrupted / "runs" / "77").iterdir()
    assert 0 < torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] < 36, printed
    for where, restarts in ((interrupted, 1), (undisturbed, 0)):
        again = job(where, words, restarts)
        printed = again.communicate(timeout=300)[0]
        assert again.returncode == 0, printed
    weights = []
    for where in (interrupted, undisturbed):
        (last,) = where.glob("runs/77/*/checkpoints/last.ckpt")
        whole = torch.load(last, weights_only=True)
        assert whole["global_step"] == 36
        weights.append(whole["state_dict"])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
