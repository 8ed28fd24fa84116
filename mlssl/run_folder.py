"""What the folder of a run holds: its config, its last checkpoint and its metrics."""

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
        FileNotFoundError: If there is no such folder or file.
        ValueError: If it is not the config of a run, or is cut off.
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
    return checked_config(path)


def checked_config(path: Path) -> dict[str, Any]:
    """Content of the config.yaml of a run.

    Raises:
        ValueError: If it is none, or was cut off.
    """
    config = read_yaml(path)
    if not isinstance(config, dict) or not {"seed_everything", "model", "data", "trainer"} <= config.keys():
        raise ValueError(
            f"{str(path)!r} is not the config of a run: pass the folder of one that mlssl fit has written, or put "
            "its config.yaml back if it was cut off"
        )
    wrong = [part for part in ("model", "data", "trainer") if not isinstance(config[part], dict)]
    wrong += [] if isinstance(config["seed_everything"], int) else ["seed_everything"]
    if wrong:
        raise ValueError(
            f"{str(path)!r} is not the config of a run, its {wrong[0]} is {config[wrong[0]]!r:.80}: put the file back "
            "that mlssl fit has written"
        )
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


def checkpoint_at(path: Path) -> Path:
    """The last checkpoint where the path is the folder of a run, and otherwise the path itself.

    Raises:
        FileNotFoundError: If the run has not saved a checkpoint.
    """
    is_run = (path / "checkpoints").is_dir() or (path / "config.yaml").is_file()
    return last_checkpoint(path) if is_run else path


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
    """Rows of ``metrics.csv`` as text by column, "" where a row has no value; none where there is no file.

    A last row that was cut off, which therefore ends without a line break, is dropped with a warning.

    Raises:
        ValueError: If it is not the log of a run; names the file and the line.
    """
    if not path.exists():
        return []
    try:
        text = path.read_bytes().decode()
        if not text.endswith("\n") and text:
            cut = text.rstrip("\r").count("\n") + 1
            warnings.warn(f"{path}, line {cut}: the last row was cut off, and is left out.", stacklevel=2)
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
            raise ValueError(f"{path}, row {number}: step is {row['step']!r:.80}, which is no number: {_REMEDY}")
    return rows


_MOST = 1e15
"""Epochs."""

_REMEDY = "put the file back as it was, or remove it to go on without what was logged"


def _number(row: dict[str, Any], name: str, path: Path, number: int) -> float:
    with suppress(ValueError):
        value = float(row[name])
        if name != "epoch" or abs(value) < _MOST:
            return value
    raise ValueError(f"{path}, row {number}: {name} is {row[name]!r:.80}, which is no number: {_REMEDY}")


def read_log(folder: str | os.PathLike[str]) -> dict[str, Log]:
    """Every quantity in a run's ``metrics.csv``, rows without a value left out; none where there is no file.

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
