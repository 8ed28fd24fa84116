"""Facts about a run: date, duration, hardware and settings."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mlssl.data.records import Records
from mlssl.durations import in_words
from mlssl.run_folder import Log
from mlssl.run_record import DONE, RUN_RECORD, RUNNING, Session, read_record, versions_of

MAX_TEXT = 300
"""Maximum number of characters shown per setting."""

MAX_COMMAND = 3000
"""Maximum number of characters shown of a command line."""


def facts_of(folder: Path, config: dict[str, Any], log: dict[str, Log]) -> dict[str, str]:
    """Settings and numbers of a run by label; no code named in them is executed.

    Args:
        folder: Run folder with its ``run.json``; a damaged one is reported, and the other facts are still given.
        config: Settings of the run.
        log: Log of the run.
    """
    data, model, trainer = config["data"], config["model"], config["trainer"]
    loss = log.get("train/loss", Log([], [], []))
    epochs = f"{int(max(loss.epochs, default=-1)) + 1}"
    if trainer.get("max_epochs"):
        epochs += f" of {trainer['max_epochs']}"
    facts = {
        **recorded(folder),
        "to run it again": f"mlssl fit --config {folder / 'config.yaml'}",
        "this page by": words_of_versions(versions_of()),
        "model": str(config.get("model_class") or "mlssl.MultiLabelSSLModule"),
        "backbone": backbone_name(config),
    }
    if config.get("data_class"):
        facts["data"] = str(config["data_class"])
    if data.get("dataset"):
        facts["data set"] = as_text(data["dataset"])
    if data.get("root"):
        facts["data folder"] = as_text(data["root"])
    facts |= {"epochs": epochs, "steps": f"{steps_taken(log):,}"}
    if "batch_size" in data:
        facts["batch size (per device)"] = str(data["batch_size"])
    if "size" in data:
        facts["views"] = f"{data['size']} × {data['size']}"
    if {"rows", "cols", "overlap"} <= data.keys():
        facts["grid"] = f"{data['rows']} × {data['cols']}, overlap {data['overlap']}"
    facts |= {name: as_text(data[name]) for name in ("branches", "regions", "local_views") if data.get(name)}
    if {"optimizer", "base_lr"} <= model.keys():
        facts["optimizer"] = f"{model['optimizer']}, base_lr {model['base_lr']}"
    facts["seed"] = str(config["seed_everything"])
    if loss.values:
        facts["loss, first → last"] = f"{loss.values[0]:.3f} → {loss.values[-1]:.3f}"
    return facts


def backbone_name(config: dict[str, Any]) -> str:
    """Backbone name in a run's config."""
    return str(config["model"].get("backbone", "custom backbone"))


def as_text(value: object) -> str:
    """A setting as one line, never evaluated."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"


def recorded(folder: Path) -> dict[str, str]:
    """Facts in a run's run.json; one sentence if it is missing or damaged."""
    try:
        sessions = read_record(folder)
    except ValueError as error:
        warnings.warn(str(error), stacklevel=2)
        return {"record": as_text(str(error))}
    if not sessions:
        return {"record": f"no {RUN_RECORD}: command, versions, hardware and duration are not known"}
    first, last = sessions[0], sessions[-1]
    facts = {
        "started": f"{datetime.fromisoformat(first.started):%Y-%m-%d %H:%M}",
        "duration": _duration(sessions),
        "command": _cut(first.command, MAX_COMMAND),
        "continued by": _cut("; ".join(one.command for one in sessions[1:]), MAX_COMMAND),
        "versions": words_of_versions(last.versions),
        "code": _code(last),
        "hardware": words_of_hardware(last.hardware),
    }
    facts |= {f"{name} set at the start": _set(counts) for name, counts in last.data.items()}
    return {name: words for name, words in facts.items() if words}


def words_of_versions(versions: dict[str, str]) -> str:
    """Packages and their versions.

    >>> words_of_versions({"python": "3.12.1", "torch": "2.9.0"})
    'python 3.12.1, torch 2.9.0'
    """
    return as_text(", ".join(f"{name} {number}" for name, number in versions.items()))


def words_of_hardware(hardware: dict[str, Any]) -> str:
    """Recorded devices, processor and system.

    >>> words_of_hardware({"device": "cpu", "devices": 1, "processor": "EPYC", "cores": 2, "threads": 1})
    '1 × cpu; EPYC, 2 cores, 1 thread'
    """
    count = hardware.get("devices", 1)
    nodes = hardware.get("nodes", 1)
    device = f"{count} × {hardware.get('device', 'device')}{_gigabytes(hardware.get('device_memory_bytes'))}"
    device += f" on {nodes} machines" if nodes != 1 else ""
    device += f", precision {hardware['precision']}" if hardware.get("precision") else ""
    threads = hardware.get("threads")
    processor = [
        str(hardware.get("processor") or "unknown processor"),
        f"{hardware['cores']} cores" if hardware.get("cores") else "",
        "" if threads is None else f"{threads} thread{'s' if threads != 1 else ''}",
        _gigabytes(hardware.get("memory_bytes")).strip(" ()"),
    ]
    parts = [device, ", ".join(one for one in processor if one), str(hardware.get("system") or "")]
    return as_text("; ".join(part for part in parts if part))


def images_of(train: Records, val: Records | None) -> dict[str, str]:
    """Numbers of images and labels of a run."""
    return {
        "training images": f"{len(train):,}",
        "val images": "none" if val is None else f"{len(val):,}",
        "labels": str(len(train.classes) or "none"),
    }


def steps_taken(log: dict[str, Log]) -> int:
    """Logged steps of a run."""
    return int(max(log["train/loss"].steps, default=-1)) + 1 if "train/loss" in log else 0


def _duration(sessions: Sequence[Session]) -> str:
    seconds = sum(one.seconds for one in sessions)
    words = f"{in_words(seconds)} for {sessions[-1].last_step:,} steps"
    words += f", in {len(sessions)} sessions" if len(sessions) > 1 else ""
    outcome = sessions[-1].outcome
    if outcome == RUNNING:
        return f"{words} up to its last epoch; it has not ended, or was killed"
    return words if outcome == DONE else f"{words}; {as_text(outcome)}"


def _code(session: Session) -> str:
    if session.commit is None:
        return ""
    changed = session.changed_files
    state = "nothing changed" if not changed else f"{changed} file{'s' if changed > 1 else ''} changed"
    return f"commit {as_text(session.commit)} of {as_text(session.directory)}, {state}"


def _set(counts: dict[str, Any]) -> str:
    words = f"{counts.get('images', 'unknown')} images"
    if "classes" in counts:
        words += f", {counts['classes']} classes, {counts.get('labels_per_image', 'unknown')} labels per image"
    return as_text(words)


def _gigabytes(number: object) -> str:
    return f" ({number / 1e9:.1f} GB)" if isinstance(number, (int, float)) else ""


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + "…"
