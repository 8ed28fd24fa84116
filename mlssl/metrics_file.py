"""metrics.csv: intact at any time, and continued on resume."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from mlssl.atomic import FULL_DISK, FullDiskError, written_aside
from mlssl.run_folder import read_rows


class MetricsFile(CSVLogger):
    """Lightning's CSVLogger, with ``metrics.csv`` directly in a folder and every row written at once.

    An existing file is continued, not deleted as by CSVLogger. On a full disk existing rows stay intact.

    Args:
        folder: Folder of ``metrics.csv``.
        first_step: First step of a resumed run: rows of this and later steps, logged after the checkpoint, are dropped.
            None: all rows stay.
    """

    def __init__(self, folder: str | os.PathLike[str], first_step: int | None = None) -> None:
        super().__init__(os.fspath(folder), name="", version="", flush_logs_every_n_steps=1)
        self.first_step = first_step

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of the file."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir, self.first_step)
        return self._experiment  # type: ignore[return-value]


class _Writer(ExperimentWriter):
    """Appends rows, and rewrites the file atomically for a new column."""

    def __init__(self, log_dir: str, first_step: int | None) -> None:
        self._path = Path(log_dir) / self.NAME_METRICS_FILE
        before = read_rows(self._path)
        kept = [row for row in before if first_step is None or int(row["step"]) < first_step]
        self.metrics: list[dict[str, Any]] = []
        self.metrics_keys: list[str] = list(before[0]) if before else []
        self.hparams: dict[str, Any] = {}
        self.log_dir = log_dir
        is_cut = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        if len(kept) < len(before) or (is_cut and before):
            self._rewrite(kept)

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Write hparams.yaml like Lightning."""
        self.hparams.update(params)
        with written_aside(Path(self.log_dir) / self.NAME_HPARAMS_FILE) as aside:
            save_hparams_to_yaml(str(aside), self.hparams)

    def save(self) -> None:
        """Write the logged rows.

        Raises:
            FullDiskError: The disk is full; existing rows stay intact.
            OSError: They cannot be written for another reason (no permission).
        """
        if not self.metrics:
            return
        rows, self.metrics = self.metrics, []
        new = sorted({key for row in rows for key in row} - set(self.metrics_keys))
        if new or not self._path.exists():
            self.metrics_keys = sorted([*self.metrics_keys, *new])
            self._rewrite([*read_rows(self._path), *rows])
        else:
            self._append(_text(self.metrics_keys, rows))

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        with written_aside(self._path) as aside:
            aside.write_text(_text(self.metrics_keys, rows, header=True), encoding="utf-8", newline="")

    def _append(self, text: str) -> None:
        size = self._path.stat().st_size
        try:
            with self._path.open("a", encoding="utf-8", newline="") as file:
                file.write(text)
        except OSError as error:
            os.truncate(self._path, size)  # leave no partial row
            if error.errno in FULL_DISK:
                raise FullDiskError(error.errno, error.strerror, str(self._path)) from error
            raise


def _text(keys: list[str], rows: list[dict[str, Any]], *, header: bool = False) -> str:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, keys)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
