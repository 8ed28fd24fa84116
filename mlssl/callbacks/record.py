"""Record versions, hardware, data and command of a run in its folder."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.records import Records
from mlssl.run_record import (
    DONE,
    FAILED,
    INTERRUPTED,
    Session,
    command_of_process,
    commit_of,
    hardware_of,
    now,
    read_record,
    versions_of,
    write_record,
)


class RunRecord(L.Callback):
    """Write ``run.json``, with what is needed to repeat the run, to the Trainer's ``default_root_dir``.

    It records versions (Python, mlssl, torch, lightning, timm, torchvision), the git commit of the working directory,
    how many tracked files differ from it, processor, memory, devices and precision, the command line with secrets
    hidden, images, classes and labels per image of each set, the start, and the duration. It is written when training
    starts, after each epoch and at the end. A run that resumes in the same folder adds a session and keeps the others.
    Only the first process writes, and nothing is written under ``fast_dev_run``. `mlssl fit` adds it by itself.

    Args:
        words: Words after `mlssl`, if they differ from those of the process, as if a program calls `mlssl.cli.main`.

    Raises:
        ValueError: Before training, if the existing ``run.json`` is damaged.
    """

    def __init__(self, words: Sequence[str] | None = None) -> None:
        self.words = words
        self._before: list[Session] = []
        self._session: Session | None = None
        self._started, self._start_time = "", 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Read the sessions before this one, and start the clock."""
        if stage == "fit":
            self._session, self._before = None, read_record(Path(trainer.default_root_dir))
            self._started, self._start_time = now(), monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write everything known at the start."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        directory = Path.cwd()
        commit, changed_files = commit_of(directory)
        self._session = Session(
            started=self._started,
            command=command_of_process(self.words),
            directory=str(directory),
            versions=versions_of(),
            hardware=hardware_of(trainer.strategy.root_device)
            | {"devices": trainer.world_size, "nodes": trainer.num_nodes, "precision": str(trainer.precision)},
            data=_counts(trainer),
            first_step=trainer.global_step,
            commit=commit,
            changed_files=changed_files,
        )
        self._write(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the progress, which remains if the process is killed."""
        self._write(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the duration."""
        self._end(trainer, DONE)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write the outcome."""
        stopped = isinstance(exception, (KeyboardInterrupt, SIGTERMException))
        with suppress(OSError):  # such as the full disk that ends the run
            self._end(trainer, INTERRUPTED if stopped else f"{FAILED}: {type(exception).__name__}")

    def _end(self, trainer: L.Trainer, outcome: str) -> None:
        if self._session is not None:
            self._session.outcome, self._session.ended = outcome, now()
            self._write(trainer)
            self._session = None

    def _write(self, trainer: L.Trainer) -> None:
        if self._session is not None:
            self._session.seconds = round(monotonic() - self._start_time, 1)
            self._session.last_step = trainer.global_step
            write_record(Path(trainer.default_root_dir), [*self._before, self._session])


def _counts(trainer: L.Trainer) -> dict[str, dict[str, Any]]:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, MultiLabelDataModule):
        sets = {"train": data.train_records, "val": data.val_records}
        return {name: counts_of(records) for name, records in sets.items() if records is not None}
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    return {"train": {"images": len(dataset)}} if isinstance(dataset, Sized) else {}


def counts_of(records: Records) -> dict[str, Any]:
    """Number of images of a set, and if labelled, of classes and labels per image.

    >>> counts_of(Records(["a.jpg", "b.jpg"], [[1, 0], [1, 1]], ["sky", "sea"]))
    {'images': 2, 'classes': 2, 'labels_per_image': 1.5}
    """
    if records.labels is None:
        return {"images": len(records)}
    positives = int(np.sum(records.labels == 1))
    per_image = round(positives / max(len(records), 1), 3)
    return {"images": len(records), "classes": len(records.classes), "labels_per_image": per_image}
