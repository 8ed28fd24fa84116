"""Refuse wrong settings of the Trainer before a run starts, each in one sentence."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from mlssl.callbacks import CollapseMonitor, LearningRate, OnlineLinearProbe, Throughput
from mlssl.callbacks.scores import OnlineScores
from mlssl.module import MultiLabelSSLModule

_MINIMUM: dict[str, tuple[float, str]] = {
    "max_epochs": (-1, "a number of epochs, or -1 for no limit"),
    "max_steps": (-1, "a number of steps, or -1 for no limit"),
    "min_epochs": (0, "a number of epochs"),
    "min_steps": (0, "a number of steps"),
    "num_nodes": (1, "the number of machines"),
    "accumulate_grad_batches": (1, "the number of batches per step"),
    "check_val_every_n_epoch": (1, "the number of epochs between validations"),
    "log_every_n_steps": (0, "the number of steps between log rows"),
    "num_sanity_val_steps": (-1, "a number of batches, or -1 for all"),
    "reload_dataloaders_every_n_epochs": (0, "a number of epochs"),
    "gradient_clip_val": (0, "a norm or value of at least 0"),
}
"""Minimum of each setting, and its meaning."""

_FRACTIONS = (
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"),
    *("overfit_batches", "val_check_interval"),
)
"""A fraction of an epoch, or a number of batches."""

_MAY_BE_0 = ("limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches")

_GPUS = ("gpu", "cuda", "mps")

_COLLAPSE_METRICS = ("std", "rank", "same_block", "same_image", "other_image")
_STEP_METRICS = ("train/loss", "train/pair_loss", "train/image_aware_loss", "loss")


def check_trainer(settings: Mapping[str, Any]) -> None:
    """Refuse impossible settings of the Trainer, and those that would fail only during training.

    Args:
        settings: Arguments of ``lightning.Trainer`` that were given.

    Raises:
        ValueError: Naming the option and what to pass.
    """
    _check_devices(settings.get("accelerator", "auto"), settings.get("devices", "auto"))
    for name, (minimum, what) in _MINIMUM.items():
        value = settings.get(name)
        if value is not None and not value >= minimum:
            raise ValueError(f"--trainer.{name} {value} was given: pass {what}.")
    for name in _FRACTIONS:
        value = settings.get(name)
        if not isinstance(value, (int, float)):  # an interval may also be a time
            continue
        is_fraction = isinstance(value, float) and 0 < value <= 1
        if is_fraction or (value >= 1 and float(value).is_integer()) or (value == 0 and name in _MAY_BE_0):
            continue
        raise ValueError(
            f"--trainer.{name} {value} was given: pass a fraction of the batches of an epoch, above 0 and up to 1.0, "
            "or a whole number of batches."
        )
    for kind in ("epochs", "steps"):
        first, last = settings.get(f"min_{kind}"), settings.get(f"max_{kind}")
        if first is not None and last not in (None, -1) and first > last:
            raise ValueError(
                f"--trainer.min_{kind} {first} is above --trainer.max_{kind} {last}: pass only one of them."
            )
    if settings.get("barebones"):
        raise ValueError(
            "--trainer.barebones disables the log and the checkpoints of mlssl fit: leave it out, or use "
            "lightning.Trainer in a script."
        )


def check_monitored(callbacks: Iterable[Callback], module: object) -> None:
    """Refuse a ModelCheckpoint or an EarlyStopping whose metric nothing logs.

    A custom class or callback may log anything: with one, the Trainer reports this at the first validation.

    Args:
        callbacks: All callbacks of the run.
        module: Module that is trained.

    Raises:
        ValueError: Naming the metric and the nearest ones.
    """
    callbacks = list(callbacks)
    of_library = ("mlssl", "lightning")
    if not all(type(one).__module__.partition(".")[0] in of_library for one in (*callbacks, module)):
        return
    known = logged_metrics(callbacks, module)
    for callback in callbacks:
        monitor = callback.monitor if isinstance(callback, (ModelCheckpoint, EarlyStopping)) else None
        if monitor is None or monitor in known:
            continue
        near = difflib.get_close_matches(monitor, sorted(known), n=1)
        meant = f"did you mean {near[0]!r}? The run logs" if near else "pass one of"
        raise ValueError(
            f"{type(callback).__name__} monitors {monitor!r}, which nothing in this run logs: {meant} "
            f"{', '.join(sorted(known))}."
        )


def logged_metrics(callbacks: Iterable[Callback], module: object) -> set[str]:
    """Names of the metrics that the library's module and callbacks log."""
    names = set(_STEP_METRICS) if isinstance(module, MultiLabelSSLModule) else set()
    for one in callbacks:
        if isinstance(one, OnlineScores):
            names |= {one.metric(f"{one.kind}/{name}") for name in ("mAP", "classes")}
        if isinstance(one, OnlineLinearProbe):
            names.add(one.metric("probe/loss"))
        if isinstance(one, CollapseMonitor):
            names |= {one.metric(f"collapse/{name}") for name in _COLLAPSE_METRICS}
        if isinstance(one, Throughput):
            names |= {"time/data", "time/step", "throughput/images_per_s"}
        if isinstance(one, LearningRate):
            names.add("train/lr")
    return names


def trainer_message(message: str) -> str:
    """The Trainer's error in one sentence that says what to do."""
    said = " ".join(message.split())
    fraction = re.search(r"requested to check ([\d.e-]+) of the `(\w+)_dataloader` but \S+ \* (\d+) < 1", said)
    if fraction is not None:
        batches = int(fraction[3])
        return (
            f"--trainer.limit_{fraction[2]}_batches {fraction[1]} of {batches} batches leaves none: pass at least "
            f"{1 / batches:.2g}, or a whole number of batches."
        )
    metric = re.search(r"(?:conditioned on metric `|monitor=')([^`']+)['`].*?(?:following: |metrics: \[)([^\]]*)", said)
    if metric is not None:
        names = ", ".join(re.findall(r"[\w/]+", metric[2]))
        return f"A callback monitors {metric[1]!r}, which nothing in this run logged: pass one of {names}."
    return f"The Trainer refuses its settings ({said.rstrip('.')}): change that --trainer option."


def _check_devices(accelerator: object, devices: Any) -> None:
    """Refuse devices that this machine does not have."""
    import torch

    has_mps = torch.backends.mps.is_available()
    available = {"cuda": torch.cuda.device_count(), "mps": int(has_mps)}
    available["gpu"] = available["auto"] = available["cuda"] or available["mps"]
    if not isinstance(accelerator, str) or accelerator not in (*available, "cpu"):
        return  # the Trainer checks other accelerators
    if accelerator in _GPUS and not available[accelerator]:
        raise ValueError(
            f"--trainer.accelerator {accelerator} was given, but torch {torch.__version__} finds no such device: "
            "pass --trainer.accelerator cpu, or check the driver and the build of torch."
        )
    most = available.get(accelerator, 0)
    wanted = _number_of_devices(devices)
    if (wanted is not None and wanted < 1) or (not most and (devices == -1 or isinstance(devices, (list, tuple)))):
        raise ValueError(
            f"--trainer.devices {devices} was given: pass a number of devices, or of processes on a CPU, such as "
            "--trainer.devices 1."
        )
    if wanted is not None and 0 < most < wanted:
        raise ValueError(
            f"--trainer.devices {devices} was given, but this machine has {most}: pass --trainer.devices {most}."
        )


def _number_of_devices(devices: Any) -> int | None:
    """Number of devices that the machine needs; None if the Trainer counts them, or will refuse the setting.

    >>> [_number_of_devices(one) for one in (2, "2", "0,3", [1], [], "auto", -1, "two")]
    [2, 2, 4, 2, 0, None, None, None]
    """
    if isinstance(devices, str):
        parts = devices.split(",")
        if not all(part.strip().isdigit() for part in parts):
            return None
        devices = int(devices) if len(parts) == 1 else [int(part) for part in parts]
    if isinstance(devices, (list, tuple)):
        return 1 + max(devices) if devices else 0
    return None if devices == -1 else int(devices)
