"""metrics.csv: every row at once, continued on resume, and intact after any failure."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlssl.metrics_file import MetricsFile


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_a_row_is_written_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    log = MetricsFile(tmp_path)
    for step in range(3):
        log.log_metrics({"loss": 0.5 * step}, step)
        assert [float(row["loss"]) for row in rows(tmp_path)] == [0.5 * one for one in range(step + 1)]


def test_a_new_column_keeps_the_rows_before_it(tmp_path: Path) -> None:
    log = MetricsFile(tmp_path)
    log.log_metrics({"loss": 1.0}, 0)
    log.log_metrics({"mAP": 0.5}, 0)
    log.log_metrics({"loss": 2.0}, 1)
    assert rows(tmp_path) == [{"loss": "1.0", "step": "0"}, {"mAP": "0.5", "step": "0"}, {"loss": "2.0", "step": "1"}]


@pytest.mark.parametrize(("first_step", "kept"), [(None, [0, 1, 2]), (2, [0, 1]), (0, []), (9, [0, 1, 2])])
def test_an_existing_file_is_continued_from_a_step(tmp_path: Path, first_step: int | None, kept: list[int]) -> None:
    log = MetricsFile(tmp_path)
    for step in range(3):
        log.log_metrics({"loss": 1.0}, step)
    again = MetricsFile(tmp_path, first_step)
    again.log_metrics({"loss": 3.0, "mAP": 0.1}, 7)
    assert [int(row["step"]) for row in rows(tmp_path)] == [*kept, 7]


def test_hyper_parameters_are_written_like_lightnings(tmp_path: Path) -> None:
    MetricsFile(tmp_path).log_hyperparams({"lr": 0.1})
    assert (tmp_path / "hparams.yaml").read_text() == "lr: 0.1\n"


FILL = """
import resource, sys
from mlssl.metrics_file import MetricsFile
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
for what in ("rows", "columns"):
    log = MetricsFile(f"{sys.argv[1]}/{what}")
    try:
        for step in range(1000):
            names = ["loss", "mAP"] if what == "rows" else [f"column {one}" for one in range(step + 1)]
            log.log_metrics({name: 0.123456789 for name in names}, step)
    except OSError as error:
        print(step, type(error).__name__, error)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="limits of this kind are those of POSIX")
def test_existing_rows_stay_intact_if_writing_fails(tmp_path: Path) -> None:
    for what in ("rows", "columns"):
        (tmp_path / what).mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    command = [sys.executable, "-c", FILL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment)
    for what, line in zip(("rows", "columns"), done.stdout.splitlines(), strict=True):
        folder, step = tmp_path / what, int(line.split()[0])
        assert step > 5
        assert "FullDiskError" in line
        assert "metrics.csv': nothing new was kept, and an existing file is intact" in line
        assert [int(row["step"]) for row in rows(folder)] == list(range(step))
        assert [path.name for path in folder.iterdir()] == ["metrics.csv"]
        assert (folder / "metrics.csv").read_bytes().endswith(b"\n")
