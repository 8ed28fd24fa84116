"""Training history of a checkpoint or of a module under a Trainer: steps, settings of model and data, metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlssl.private import trainer_of

_PRIVATE_SETTINGS = (
    *("root", "annotations", "images", "val_annotations", "val_images", "probe", "num_workers"),
    "_instantiator",
)
"""Settings left out: they describe the machine or how Lightning builds the objects, not the training."""


def history_of_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """History of a checkpoint, as header entries of an exported file."""
    model, data = (checkpoint.get(name) for name in ("hyper_parameters", "datamodule_hyper_parameters"))
    return _history(checkpoint.get("global_step"), model, data, checkpoint.get("metrics"))


def history_of_module(module: Any) -> dict[str, str]:
    """History of a module under a Trainer; empty without a Trainer."""
    trainer = trainer_of(module)
    if trainer is None:
        return {}
    data = getattr(trainer, "datamodule", None)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    model = getattr(module, "hparams", None)
    return _history(trainer.global_step, model, getattr(data, "hparams", None), metrics)


def _history(
    steps: int | None,
    model: Mapping[str, Any] | None,
    data: Mapping[str, Any] | None,
    metrics: Mapping[str, float] | None,
) -> dict[str, str]:
    entries: dict[str, str] = {}
    if steps is not None:
        entries["steps"] = str(steps)
    for name, settings in (("model", model), ("data", data)):
        if settings:
            entries[name] = json.dumps({k: v for k, v in settings.items() if k not in _PRIVATE_SETTINGS}, default=repr)
    if metrics:
        entries["metrics"] = json.dumps({name: round(float(value), 6) for name, value in metrics.items()})
    return entries
