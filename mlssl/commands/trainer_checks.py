"""What is refused of the Trainer's settings before a run begins, each in one sentence."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from mlssl.callbacks import CollapseMonitor, LearningRate, OnlineLinearProbe, Throughput
from mlssl.callbacks.scores import OnlineScores
from mlssl.module import MultiLabelSSLModule

_LEAST: dict[str, tuple[float, str]] = {
    "max_epochs": (-1, "a number of epochs, or -1 for no limit"),
    "max_steps": (-1, "a number of steps, or -1 for no limit"),
    "min_epochs": (0, "a number of epochs"),
    "min_steps": (0, "a number of steps"),
    "num_nodes": (1, "the number of machines"),
    "accumulate_grad_batches": (1, "the number of batches of one step"),
    "check_val_every_n_epoch": (1, "the number of epochs from one validation to the next"),
    "log_every_n_steps": (0, "the number of steps from one row of the log to the next"),
    "num_sanity_val_steps": (-1, "a number of batches, or -1 for all"),
    "reload_dataloaders_every_n_epochs": (0, "a number of epochs"),
    "gradient_clip_val": (0, "a norm or value of at least 0"),
}
"""Least value of each setting, and what it is."""

_SHARES = (
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches"),
    *("overfit_batches", "val_check_interval"),
)
"""A fraction of an epoch, or a number of batches."""

_MAY_BE_0 = ("limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches")

_GPUS = ("gpu", "cuda", "mps")

_OF_COLLAPSE = ("std", "rank", "same_block", "same_image", "other_image")
_OF_ONE_STEP = ("train/loss", "train/pair_loss", "train/image_aware_loss", "loss")


def check_trainer(settings: Mapping[str, Any]) -> None:
    """Refuse settings of the Trainer that cannot be met, and those that would fail during the training.

    Args:
        settings: Arguments of ``lightning.Trainer`` that were given.

    Raises:
        ValueError: Naming the option and what to pass.
    """
    _check_devices(settings.get("accelerator", "auto"), settings.get("devices", "auto"))
    for name, (least, what) in _LEAST.items():
        value = settings.get(name)
        if value is not None and not value >= least:
            raise ValueError(f"--trainer.{name} {value} was given: pass {what}.")
    for name in _SHARES:
        value = settings.get(name)
        if not isinstance(value, (int, float)):  # an interval can be a time too
            continue
        is_share = isinstance(value, float) and 0 < value <= 1
        if is_share or (value >= 1 and float(value).is_integer()) or (value == 0 and name in _MAY_BE_0):
            continue
        raise ValueError(
            f"--trainer.{name} {value} was given: pass a fraction of the batches of an epoch, above 0 and up to 1.0, "
            "or a whole number of batches."
        )
    for kind in ("epochs", "steps"):
        first, last = settings.get(f"min_{kind}"), settings.get(f"max_{kind}")
        if first is not None and last not in (None, -1) and first > last:
            raise ValueError(
                f"--trainer.min_{kind} {first} is above --trainer.max_{kind} {last}: pass one of the two alone."
            )
    if settings.get("barebones"):
        raise ValueError(
            "--trainer.barebones leaves out log and checkpoints, which mlssl fit writes: leave it out, or use a "
            "lightning.Trainer of your own."
        )


def check_monitored(callbacks: Iterable[Callback], module: object) -> None:
    """Refuse a ModelCheckpoint or an EarlyStopping whose metric nothing logs.

    A class or a callback of the user's may log anything: with one, this is found at the first validation.

    Args:
        callbacks: All of the run.
        module: What is trained.

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
        meant = f"did you mean {near[0]!r}? All are" if near else "pass one of"
        raise ValueError(
            f"{type(callback).__name__} monitors {monitor!r}, which nothing in this run logs: {meant} "
            f"{', '.join(sorted(known))}."
        )


def logged_metrics(callbacks: Iterable[Callback], module: object) -> set[str]:
    """Names that the library's module and callbacks give to the Trainer in a run."""
    names = set(_OF_ONE_STEP) if isinstance(module, MultiLabelSSLModule) else set()
    for one in callbacks:
        if isinstance(one, OnlineScores):
            names |= {one.metric(f"{one.kind}/{name}") for name in ("mAP", "classes")}
        if isinstance(one, OnlineLinearProbe):
            names.add(one.metric("probe/loss"))
        if isinstance(one, CollapseMonitor):
            names |= {one.metric(f"collapse/{name}") for name in _OF_COLLAPSE}
        if isinstance(one, Throughput):
            names |= {"time/data", "time/step", "throughput/images_per_s"}
        if isinstance(one, LearningRate):
            names.add("train/lr")
    return names


def said_of_trainer(message: str) -> str:
    """The Trainer's refusal in one sentence that says what to do."""
    said = " ".join(message.split())
    share = re.search(r"requested to check ([\d.e-]+) of the `(\w+)_dataloader` but \S+ \* (\d+) < 1", said)
    if share is not None:
        batches = int(share[3])
        return (
            f"--trainer.limit_{share[2]}_batches {share[1]} of {batches} batches leaves none: pass at least "
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
    there = {"cuda": torch.cuda.device_count(), "mps": int(has_mps)}
    there["gpu"] = there["auto"] = there["cuda"] or there["mps"]
    if not isinstance(accelerator, str) or accelerator not in (*there, "cpu"):
        return  # the Trainer knows others
    if accelerator in _GPUS and not there[accelerator]:
        raise ValueError(
            f"--trainer.accelerator {accelerator} was given, and torch {torch.__version__} finds no such device here: "
            "pass --trainer.accelerator cpu, or look at the driver and at the build of torch."
        )
    most = there.get(accelerator, 0)
    wanted = _number_of_devices(devices)
    if (wanted is not None and wanted < 1) or (not most and (devices == -1 or isinstance(devices, (list, tuple)))):
        raise ValueError(
            f"--trainer.devices {devices} was given: pass a number of devices, on a processor one of processes, such "
            "as --trainer.devices 1."
        )
    if wanted is not None and 0 < most < wanted:
        raise ValueError(
            f"--trainer.devices {devices} was given, and this machine has {most}: pass --trainer.devices {most}."
        )


def _number_of_devices(devices: Any) -> int | None:
    """Least number that a machine has to have; None where the Trainer counts them, or will refuse the setting.

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
