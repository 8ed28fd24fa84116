"""metrics.csv: whole at any time, and continued where a run is."""

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
    """Lightning's CSVLogger with ``metrics.csv`` right in a folder, and every row in it as soon as it is logged.

    A file that is there is continued, where CSVLogger deletes it. On a full disk the rows that were there stay whole.

    Args:
        folder: Where ``metrics.csv`` lies.
        first_step: A resumed run logs from this step on: rows of that step and later, which were logged after the
            checkpoint that it goes on from, are dropped. None: all rows stay.
    """

    def __init__(self, folder: str | os.PathLike[str], first_step: int | None = None) -> None:
        super().__init__(os.fspath(folder), name="", version="", flush_logs_every_n_steps=1)
        self.first_step = first_step

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """What writes the file."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir, self.first_step)
        return self._experiment  # type: ignore[return-value]


class _Writer(ExperimentWriter):
    """Rewrites the file aside where a row brings a new column, and else appends to it."""

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
        """Write hparams.yaml, as Lightning does."""
        self.hparams.update(params)
        with written_aside(Path(self.log_dir) / self.NAME_HPARAMS_FILE) as aside:
            save_hparams_to_yaml(str(aside), self.hparams)

    def save(self) -> None:
        """Write the rows that were logged.

        Raises:
            FullDiskError: If there is no space for them; those that were there stay whole.
            OSError: If they cannot be written otherwise (no permission).
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
            os.truncate(self._path, size)  # no half row stays
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
