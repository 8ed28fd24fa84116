"""A killed and resumed run is one run in Weights & Biases too, with the history of an undisturbed one."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import wandb
from commands.test_run import SMALL, records_of

from mlssl.cli import main
from mlssl.module import MultiLabelSSLModule
from mlssl.runs import RUN_FOLDER_VARIABLE

STEPS, DEATH = 3, 5
"""Steps of an epoch, and the step in which the process is killed."""

WRITTEN = 20
"""Seconds after which wandb's service has written its data to a file; a kill loses the last few."""

WORDS = [
    *("fit", *SMALL, "--trainer.max_epochs", "3", "--trainer.logger", "WandbLogger"),
    *("--trainer.logger.offline", "true", "--trainer.logger.project", "shelf"),
]


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (RUN_FOLDER_VARIABLE, "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "")
    for name, value in {"WANDB_SILENT": "true", "WANDB_MODE": "offline", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)


def fit_and_die(folder: Path, environment: dict[str, str]) -> None:
    """In a separate process: train in `folder` until it is killed."""
    import torch

    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    step = MultiLabelSSLModule.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == DEATH:
            time.sleep(WRITTEN)
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch, batch_idx)

    MultiLabelSSLModule.training_step = training_step  # type: ignore[method-assign]
    main([*WORDS, "--name", "killed"])


def history(path: Path) -> dict[tuple[str, int], Any]:
    """The content of a file by name and step, without times and file names."""
    found = {}
    for record in records_of(path):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name, value in row.items():
                if not name.startswith(("_", "time/", "throughput/", "trainer/")) and isinstance(value, float | int):
                    found[name, int(row["trainer/global_step"])] = value
    return found


def parts_of(run: Path) -> list[Path]:
    """Files of a run in the order of creation."""
    return sorted(run.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.thorough
def test_a_killed_run_resumes_under_its_id_with_the_same_history(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlssl", "mlssl.callbacks"])
    names = ("MLSSL_RUN_FOLDER", "PL_GLOBAL_SEED", "PL_SEED_WORKERS", "WANDB_SILENT", "WANDB_MODE", "HOME")
    process = context.Process(target=fit_and_die, args=(tmp_path, {name: os.environ[name] for name in names}))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    (killed,) = Path("runs").iterdir()
    assert main(["fit", "--resume", str(killed)]) == 0
    assert main([*WORDS, "--name", "undisturbed"]) == 0
    wandb.teardown()  # waits until everything is written

    (undisturbed,) = Path("runs").glob("undisturbed-*")
    (whole,) = map(history, parts_of(undisturbed))
    first, second = map(history, parts_of(killed))
    ids = [
        record.run.run_id
        for path in parts_of(killed)
        for record in records_of(path)
        if record.WhichOneof("record_type") == "run"
    ]
    assert len(ids) >= 2
    assert len(set(ids)) == 1
    assert ids[0] in parts_of(killed)[0].name
    # It was killed in the second epoch, and resumes from the end of the first.
    assert {step for name, step in first if name == "train/loss"} == {0, 1, 2, 3, 4}
    assert {step for name, step in second if name == "train/loss"} == {3, 4, 5, 6, 7, 8}
    assert {step for name, step in whole if name == "train/loss"} == set(range(3 * STEPS))
    repeated = first.keys() & second.keys()
    assert repeated
    assert {one: first[one] for one in repeated} == {one: second[one] for one in repeated}
    assert first | second == whole
