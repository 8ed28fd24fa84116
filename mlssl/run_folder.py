"""What the folder of a run holds: its config, its last checkpoint and its metrics."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any, NamedTuple

import yaml

METRICS = "metrics.csv"


class Log(NamedTuple):
    """A quantity over a run: steps, epochs and values, of the same length."""

    steps: list[float]
    epochs: list[float]
    values: list[float]


def read_config(folder: Path) -> dict[str, Any]:
    """Settings of a run, from its config.yaml.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If it is not the config of a run.
    """
    path = folder / "config.yaml"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {str(folder)!r}: pass the folder of a run, such as runs/fit-20250101-120000"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"no config.yaml in {str(folder)!r}: pass the folder of a run that mlssl fit has written"
        )
    config = yaml.safe_load(path.read_text())
    if not isinstance(config, dict) or not {"seed_everything", "model", "data", "trainer"} <= config.keys():
        raise ValueError(f"{str(path)!r} is not the config of a run: pass the folder of one that mlssl fit has written")
    return config


def last_checkpoint(folder: Path) -> Path:
    """``checkpoints/last.ckpt`` of a run, or the latest where there is none of that name.

    Raises:
        FileNotFoundError: If there is no checkpoint.
    """
    found = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    last = [path for path in found if path.name == "last.ckpt"]
    if not found:
        raise FileNotFoundError(f"no checkpoint in {str(folder / 'checkpoints')!r}: the run has not saved any yet")
    return (last or found)[-1]


def resumable_run(folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Config and last checkpoint of a run that is to go on in its own folder.

    Raises:
        FileNotFoundError: If there is no such folder, or it lacks one of the two.
    """
    folder = Path(folder)
    config, checkpoint = folder / "config.yaml", folder / "checkpoints" / "last.ckpt"
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no run at {folder}: pass the folder of one, --resume runs/NAME-<time>.")
    for file in (config, checkpoint):
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} cannot go on, it has no {file.relative_to(folder)}: pass the folder of a run that "
                "saved a checkpoint, or start it again."
            )
    return config, checkpoint


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of ``metrics.csv`` as text by column, "" where a row has no value; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_log(folder: str | os.PathLike[str]) -> dict[str, Log]:
    """Every quantity in a run's ``metrics.csv``, rows without a value left out; none where there is no file."""
    log: dict[str, Log] = {}
    for row in read_rows(Path(folder) / METRICS):
        for name, value in row.items():
            if value and name not in ("step", "epoch"):
                steps, epochs, values = log.setdefault(name, Log([], [], []))
                steps.append(float(row.get("step") or 0))
                epochs.append(float(row.get("epoch") or 0))
                values.append(float(value))
    return log
