"""Read a run folder: its config, last checkpoint and metrics."""

from __future__ import annotations

import csv
import io
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from mlssl.safe_yaml import read_yaml

METRICS = "metrics.csv"


class Log(NamedTuple):
    """A quantity over a run: steps, epochs and values, of the same length."""

    steps: list[float]
    epochs: list[float]
    values: list[float]


def read_config(folder: Path) -> dict[str, Any]:
    """Settings of a run, from its config.yaml.

    Raises:
        FileNotFoundError: The folder or file does not exist.
        ValueError: It is not the config of a run, or is truncated.
    """
    path = folder / "config.yaml"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {str(folder)!r}: pass the folder of a run, such as runs/fit-20250101-120000"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no config.yaml in {str(folder)!r}: pass a run folder written by mlssl fit")
    return checked_config(path)


def checked_config(path: Path) -> dict[str, Any]:
    """Content of a run's config.yaml.

    Raises:
        ValueError: It is not a run's config, or is truncated.
    """
    config = read_yaml(path)
    if not isinstance(config, dict) or not {"seed_everything", "model", "data", "trainer"} <= config.keys():
        raise ValueError(
            f"{str(path)!r} is not the config of a run: pass a run folder written by mlssl fit, or restore its "
            "config.yaml if it was truncated"
        )
    wrong = [part for part in ("model", "data", "trainer") if not isinstance(config[part], dict)]
    wrong += [] if isinstance(config["seed_everything"], int) else ["seed_everything"]
    if wrong:
        raise ValueError(
            f"{str(path)!r} is not the config of a run, its {wrong[0]} is {config[wrong[0]]!r:.80}: restore the file "
            "written by mlssl fit"
        )
    return config


def last_checkpoint(folder: Path) -> Path:
    """``checkpoints/last.ckpt`` of a run, or else its latest checkpoint.

    Raises:
        FileNotFoundError: There is no checkpoint.
    """
    found = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    last = [path for path in found if path.name == "last.ckpt"]
    if not found:
        raise FileNotFoundError(f"no checkpoint in {str(folder / 'checkpoints')!r}: the run has not saved any yet")
    return (last or found)[-1]


def checkpoint_at(path: Path) -> Path:
    """The last checkpoint of a run folder, or the path itself if it is not one.

    Raises:
        FileNotFoundError: The run has not saved a checkpoint.
    """
    is_run = (path / "checkpoints").is_dir() or (path / "config.yaml").is_file()
    return last_checkpoint(path) if is_run else path


def resumable_run(folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Config and last checkpoint of a run to resume in its own folder.

    Raises:
        FileNotFoundError: The folder does not exist, or lacks one of the two.
    """
    folder = Path(folder)
    config, checkpoint = folder / "config.yaml", folder / "checkpoints" / "last.ckpt"
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no run at {folder}: pass the folder of one, --resume runs/NAME-<time>.")
    for file in (config, checkpoint):
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} cannot be resumed, it has no {file.relative_to(folder)}: pass the folder of a run that "
                "saved a checkpoint, or start it again."
            )
    return config, checkpoint


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of ``metrics.csv`` as text by column, "" for missing values; empty if the file does not exist.

    A truncated last row, without a line break, is dropped with a warning.

    Raises:
        ValueError: It is not the log of a run; names the file and the line.
    """
    if not path.exists():
        return []
    try:
        text = path.read_bytes().decode()
        if not text.endswith("\n") and text:
            cut = text.rstrip("\r").count("\n") + 1
            warnings.warn(f"{path}, line {cut}: the last row is truncated, and is left out.", stacklevel=2)
            text = text[: text.rfind("\n") + 1]
        lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        names = next(lines, [])
        rows = [dict(zip(names, row, strict=True)) for row in lines if row]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not the log of a run or is damaged ({error}): {_REMEDY}") from None
    if names and ("step" not in names or len(set(names)) < len(names)):
        raise ValueError(f"{path} is not the log of a run, its columns are {', '.join(names):.80}: {_REMEDY}")
    for number, row in enumerate(rows, start=1):
        if not (row["step"].isascii() and row["step"].isdigit() and len(row["step"]) < 19):
            raise ValueError(f"{path}, row {number}: step is {row['step']!r:.80}, which is not a number: {_REMEDY}")
    return rows


_MOST = 1e15
"""Epochs."""

_REMEDY = "restore the file, or remove it to continue without the logged values"


def _number(row: dict[str, Any], name: str, path: Path, number: int) -> float:
    with suppress(ValueError):
        value = float(row[name])
        if name != "epoch" or abs(value) < _MOST:
            return value
    raise ValueError(f"{path}, row {number}: {name} is {row[name]!r:.80}, which is not a number: {_REMEDY}")


def read_log(folder: str | os.PathLike[str]) -> dict[str, Log]:
    """Every quantity in a run's ``metrics.csv`` without missing values; empty if the file does not exist.

    Raises:
        ValueError: As `read_rows`.
    """
    log: dict[str, Log] = {}
    path = Path(folder) / METRICS
    for number, row in enumerate(read_rows(path), start=1):
        epoch = _number(row, "epoch", path, number) if row.get("epoch") else 0.0
        for name, value in row.items():
            if value and name not in ("step", "epoch"):
                steps, epochs, values = log.setdefault(name, Log([], [], []))
                steps.append(float(row["step"]))
                epochs.append(epoch)
                values.append(_number(row, name, path, number))
    return log
