"""Summary of a run's data and views, printed once at its start."""

from __future__ import annotations

import math
import os
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from mlssl.callbacks.position import position_of
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.distributed import world_size
from mlssl.private import BatchNorm

Rows = list[tuple[str, str]]
"""Name and content of each row of a block."""

_INDENT = 10

_NO_BREAK = "\0"
"""Placeholder for the space between a class and its count, where a line must not break."""

_MAX_WIDTH = 120
"""Maximum width of a block in columns."""


class StepSummary(L.Callback):
    """Print one block about a run: images, classes, views, positives and negatives, devices, folder.

    It is printed at the first step of a fit, before the bar, and at the start of a validation, test or prediction. On
    several devices it warns if batch norms are not synchronised. `MultiLabelSSLModule` adds it itself.
    """

    def __init__(self) -> None:
        self._is_printed = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Print again in another fit."""
        self._is_printed = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Print the summary at the first batch of the run."""
        if self._is_printed or "views" not in batch:
            return
        unsynchronised = count_unsynchronised(pl_module.modules())
        if unsynchronised and world_size() > 1:
            rank_zero_warn(
                f"{unsynchronised} batch norms use the statistics of one device only, so {world_size()} devices do not "
                "compute the same as one: on GPUs, pass sync_batchnorm=True to the Trainer "
                "(--trainer.sync_batchnorm true)."
            )
        group = getattr(getattr(pl_module, "image_aware_loss", None), "group", None)
        step = describe_step(batch["views"], world_size(), world_size(group))
        if trainer.accumulate_grad_batches > 1:
            step += ", and gradient accumulation does not add any"
        rows = [*rows_of_data(trainer), ("step", step), *_rows_of_length(trainer, batch_idx)]
        self._print([*rows, *_rows_of_machine(trainer, pl_module)])

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the summary, unless this is part of a fit."""
        if trainer.state.fn == "validate":
            self._print([*rows_of_data(trainer), *_rows_of_machine(trainer, pl_module)])

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the summary."""
        self._print([*rows_of_data(trainer), *_rows_of_machine(trainer, pl_module)])

    on_predict_start = on_test_start

    def _print(self, rows: Rows) -> None:
        if not self._is_printed:
            self._is_printed = True
            rank_zero_info(block(rows))


def block(rows: Sequence[tuple[str, str]], columns: int | None = None) -> str:
    """Format rows as text, wrapped to the width of the terminal, after a blank line.

    >>> print(block([("images", "4500"), ("folder", "runs/fit")], 40))
    <BLANKLINE>
    images    4500
    folder    runs/fit
    """
    width = min(_MAX_WIDTH, columns or shutil.get_terminal_size().columns - 1)
    lines = []
    for name, content in rows:
        fold = textwrap.TextWrapper(
            width,
            initial_indent=f"{name:<{_INDENT}}" if len(name) < _INDENT else f"{name}  ",
            subsequent_indent=" " * _INDENT,
            break_long_words=False,
            break_on_hyphens=False,
        )
        kept = re.sub(r" (?=\d+(?:[,;)]|$))", _NO_BREAK, content)
        lines += [line.replace(_NO_BREAK, " ") for line in fold.wrap(kept)]
    return "\n" + "\n".join(lines)


def rows_of_data(trainer: L.Trainer) -> Rows:
    """Images, classes and frequencies of each set; for another datamodule, only the number of images."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, MultiLabelDataModule):
        return data.description()
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    return [("train", f"{len(dataset)} images")] if isinstance(dataset, Sized) else []


def describe_step(views: Tensor, devices: int, compared: int | None = None) -> str:
    """Describe a step on views (B, A, K, C, S, S) per device, with keys of `compared` (by default all) devices.

    >>> import torch
    >>> describe_step(torch.zeros(4, 2, 3, 3, 8, 8), 1)
    '4 images, 24 views of 8 × 8 pixels (2 × 3 per image); each anchor meets 5 positives and 18 negatives'
    """
    images, branches, blocks, _, height, width = views.shape
    anchors = 2 * images * blocks * (compared or devices)  # per term: predictions of a branch, projections of another
    positives = 2 * blocks - 1
    per_device = f" on each of {devices} devices" if devices > 1 else ""
    return (
        f"{images} images{per_device}, {images * branches * blocks * devices} views of {height} × {width} pixels "
        f"({branches} × {blocks} per image); each anchor meets {positives} positives and "
        f"{anchors - 1 - positives} negatives"
    )


def _rows_of_length(trainer: L.Trainer, batch_idx: int) -> Rows:
    per_epoch, position = trainer.num_training_batches, position_of(trainer, batch_idx)
    rows = []
    data = trainer.datamodule  # type: ignore[attr-defined]
    if math.isfinite(per_epoch):
        rest = 0
        if isinstance(data, MultiLabelDataModule) and data.train_records is not None and _uses_all_batches(trainer):
            rest = len(data.train_records) % (data.hparams["batch_size"] * trainer.world_size)
        left_out = f"; {rest} images are left out, different ones each time" if rest else ""
        rows.append(("epoch", f"{int(per_epoch)} steps{left_out}"))
    if math.isfinite(position.total):
        number = trainer.max_epochs or -1
        epochs = f"{number} epoch{'s' if number > 1 else ''}, " if number > 0 else ""
        done = f", {position.done} of them done" if position.done else ""
        rows.append(("run", f"{epochs}{int(position.total)} steps{done}"))
    return rows


def _uses_all_batches(trainer: L.Trainer) -> bool:
    return trainer.limit_train_batches in (None, 1.0)


def _rows_of_machine(trainer: L.Trainer, pl_module: L.LightningModule) -> Rows:
    name = pl_module.hparams.get("backbone", type(getattr(pl_module, "backbone", pl_module)).__name__)
    parameters = sum(parameter.numel() for parameter in pl_module.parameters())
    loaders = (trainer.train_dataloader, trainer.val_dataloaders, trainer.predict_dataloaders)
    workers = getattr(next((one for one in loaders if one is not None), None), "num_workers", None)
    loading = "" if workers is None else f", loader processes {workers}" + " per device" * (trainer.world_size > 1)
    return [
        ("network", f"{name} and its heads, {_short(parameters)} parameters"),
        ("devices", f"{trainer.world_size} × {_device(trainer)}, precision {trainer.precision}{loading}"),
        ("folder", _folder(trainer)),
    ]


def _folder(trainer: L.Trainer) -> str:
    has_views = (Path(trainer.default_root_dir) / "views").is_dir()
    return f"{trainer.default_root_dir}{', with pictures of the views in views/' if has_views else ''}"


def _short(number: int) -> str:
    return f"{number / 1e6:.1f} million" if number >= 1e5 else f"{number}"


def _device(trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({os.cpu_count()} cores)" if device.type == "cpu" else device.type.upper()


def count_unsynchronised(layers: Iterable[nn.Module]) -> int:
    """Count the batch norms in training mode that use the statistics of one device only."""
    return sum(
        isinstance(layer, BatchNorm) and type(layer) is not nn.SyncBatchNorm and layer.training for layer in layers
    )
