"""Facts about a run: when, how long, on what, and by which settings."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from mlssl.data.records import Records
from mlssl.run_folder import Log

MAX_TEXT = 300
"""Characters of a setting that are shown."""

_TIME = re.compile(r"-(\d{8}-\d{6})(-\d+)?$")
"""At the end of the name of a run's folder."""


def facts_of(folder: Path, config: dict[str, Any], log: dict[str, Log], versions: str) -> dict[str, str]:
    """Settings and numbers of a run, by the words that stand before them; no code that they name is run.

    Args:
        folder: Of the run, whose name tells its date.
        config: Its settings.
        log: Its log.
        versions: In words.
    """
    data, model, trainer = config["data"], config["model"], config["trainer"]
    loss = log.get("train/loss", Log([], [], []))
    epochs = f"{int(max(loss.epochs, default=-1)) + 1}"
    if trainer.get("max_epochs"):
        epochs += f" of {trainer['max_epochs']}"
    facts = {
        "started": _started(folder),
        "training time": _training_time(log),
        "to run it again": f"mlssl fit --config {folder / 'config.yaml'}",
        "versions": versions,
        "model": str(config.get("model_class") or "mlssl.MultiLabelSSLModule"),
        "backbone": backbone_name(config),
    }
    facts = {name: words for name, words in facts.items() if words}
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
    """Of the config of a run."""
    return str(config["model"].get("backbone", "custom backbone"))


def as_text(value: object) -> str:
    """A setting as one line, never evaluated."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"


def images_of(train: Records, val: Records | None) -> dict[str, str]:
    """How many images and labels a run has."""
    return {
        "training images": f"{len(train):,}",
        "val images": "none" if val is None else f"{len(val):,}",
        "labels": str(len(train.classes) or "none"),
    }


def steps_taken(log: dict[str, Log]) -> int:
    """Steps of a run, as far as it has logged them."""
    return int(max(log["train/loss"].steps, default=-1)) + 1 if "train/loss" in log else 0


def _started(folder: Path) -> str:
    found = _TIME.search(folder.resolve().name)
    return "" if found is None else f"{datetime.strptime(found[1], '%Y%m%d-%H%M%S'):%Y-%m-%d %H:%M}"


def _training_time(log: dict[str, Log]) -> str:
    """Mean seconds per step, by all of them: what a log tells wherever it was copied, without validation."""
    if not {"time/data", "time/step"} <= log.keys():
        return ""
    values = [sum(pair) for pair in zip(log["time/data"].values, log["time/step"].values, strict=False)]
    seconds = steps_taken(log) * sum(values) / max(len(values), 1)
    shown = f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min" if seconds >= 90 else ""
    return f"about {shown or f'{seconds:.0f} s'}, without validation"
