"""A small run in a separate process, which may kill itself at any point; for tests/test_resume.py."""

from __future__ import annotations

import csv
import hashlib
import multiprocessing
import os
import random
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

import mlssl.atomic
from mlssl.callbacks import CollapseMonitor, OnlineLinearProbe, RandomState, Throughput
from mlssl.checkpoint import AtomicCheckpointIO, RunCheckpoint
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.loader import ResumableLoader
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.metrics_file import MetricsFile
from mlssl.module import MultiLabelSSLModule
from mlssl.runs import steps_of

Whom = Literal["itself", "a worker", "all", "the next pass"]
STEPS, EVERY = 5, 2
"""Steps of an epoch, and steps between two checkpoints, which cover every position in an epoch."""


class Death(L.Callback):
    """Send a signal at a random point of a random step, in a hook or while a checkpoint is written.

    To this process, to one of its workers, or to all of them, as a scheduler does. Or stop the batches of the next
    pass over the training images.
    """

    def __init__(self, seed: int, number: signal.Signals, whom: Whom) -> None:
        self.left = random.Random(seed).randint(1, 14)
        self.number, self.whom = number, whom
        self.flush = mlssl.atomic._flush
        mlssl.atomic._flush = self.on_flush

    def on_flush(self, path: Path) -> None:
        if path.suffix == ".ckpt":
            self.strike()
        self.flush(path)

    def strike(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left != 0:
            return
        if self.whom == "all":
            os.killpg(0, self.number)
        elif self.whom == "the next pass":
            ResumableLoader.__iter__ = no_batch  # type: ignore[method-assign]
        else:
            os.kill(os.getpid() if self.whom == "itself" else youngest_worker(), self.number)

    on_train_batch_start = on_before_optimizer_step = on_train_batch_end = strike
    on_validation_batch_start = on_train_epoch_start = strike


def no_batch(_loader: ResumableLoader) -> Iterator[Any]:
    """Behave as if the workers had died meanwhile."""
    raise RuntimeError("No batch came")
    yield


def youngest_worker() -> int:
    """A worker of the running training loader: those of the first validation are older."""
    return max(child.pid or 0 for child in multiprocessing.active_children())


def run(folder: Path, epochs: int, seed: int | None, number: signal.Signals, whom: Whom) -> None:
    """Train from folder/last.ckpt, if it exists, to the end or to a kill determined by `seed`."""
    os.setsid()  # a separate process group
    multiprocessing.set_start_method("fork", force=True)  # the default of loader workers
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    model = MultiLabelSSLModule(
        "test_vit", projection_dim=16, predictor_dim=8, backbone_kwargs={"drop_path_rate": 0.3, "proj_drop_rate": 0.1}
    )
    data = MultiLabelDataModule(
        train=synthetic_scenes("train", size=32, count=4 * STEPS + 2),
        val=synthetic_scenes("test", size=32, count=6),
        batch_size=4,
        size=32,
        num_workers=2,
    )
    probe = OnlineLinearProbe()
    callbacks = [probe, CollapseMonitor(), RandomState(), Throughput()]
    if seed is not None:
        callbacks.append(Death(seed, number, whom))
    last = folder / "last.ckpt"
    saver = RunCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=EVERY, save_last=True)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[*callbacks, saver],
        plugins=[AtomicCheckpointIO()],
        logger=MetricsFile(folder, steps_of(last) if last.exists() else None),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(model, data, ckpt_path=last if last.exists() else None, weights_only=True)
    everything = {
        "weights": model.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "probe": probe.state_dict(),
        "random": torch.get_rng_state(),
        "steps": trainer.global_step,
    }
    (folder / "hash").write_text("".join(f"{name} {fingerprint(part)}\n" for name, part in everything.items()))


def fingerprint(value: object) -> str:
    """SHA-256 of everything in nested containers, tensors by their bytes."""
    digest = hashlib.sha256()

    def add(part: object) -> None:
        if isinstance(part, dict):
            for key in sorted(part, key=repr):
                digest.update(repr(key).encode())
                add(part[key])
        elif isinstance(part, (list, tuple)):
            for one in part:
                add(one)
        elif isinstance(part, Tensor):
            digest.update(part.detach().contiguous().numpy().tobytes())
        else:
            digest.update(repr(part).encode())

    add(value)
    return digest.hexdigest()


def log_of(folder: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without times."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if value and not name.startswith(("time", "thr"))}
            for row in csv.DictReader(file)
        ]
