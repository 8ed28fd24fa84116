"""Export the backbone while training and at the end."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from mlssl.callbacks.networks import BACKBONE, NetworkCallback
from mlssl.distributed import is_sharded
from mlssl.export import EXPORT_SUFFIXES, check_format, export_backbone, fitting_format


class BackboneExport(NetworkCallback):
    """Export the backbone by :func:`mlssl.export_backbone` every n epochs and at the end of the fit.

    Files are ``backbone-epoch=NN.<suffix>``, epochs counted from 0 as in checkpoint names, and ``backbone.<suffix>``
    with the final weights of the fit (those of an averaging callback, if one is used). For another network, its name
    replaces ``backbone``. Existing files are kept: the new one gets ``-v1``, ``-v2``, … after its name. Only rank 0
    writes, nothing is written under ``fast_dev_run``, and weights, training flags and random state do not change.
    A network sharded by FSDP is not exported; a message says that `mlssl export` exports its checkpoint.
    With a ``WandbLogger`` each export is also an artifact of the run, with the last logged metrics.

    Args:
        format: A format of :func:`mlssl.export_backbone`; None takes the first of timm, torchvision and safetensors
            that supports the backbone.
        every_n_epochs: Epochs ≥ 1 between exports; None exports only at the end.
        directory: Output folder; None is ``exports/`` in the Trainer's ``default_root_dir``.
        network: Name of the submodule to write; it needs the backbone's architecture.

    Raises:
        ValueError: On an unknown format or ``every_n_epochs`` < 1; before training, if the module has no such network
            or the format does not support it.
    """

    def __init__(
        self,
        format: str | None = None,
        every_n_epochs: int | None = None,
        directory: str | os.PathLike[str] | None = None,
        network: str = BACKBONE,
    ) -> None:
        super().__init__(network)
        check_format(format)
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ValueError(
                f"every_n_epochs={every_n_epochs} was given: pass at least 1, or None to export at the end."
            )
        self.format = format
        self.every_n_epochs = every_n_epochs
        self.directory = directory
        self._is_sharded = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check before training that the backbone can be exported."""
        if self.is_of_backbone and "backbone" not in dict(pl_module.named_children()):
            raise ValueError(
                f"BackboneExport needs a module with its network as .backbone, but {type(pl_module).__name__} has "
                "none: set self.backbone, or leave the callback out."
            )
        self._is_sharded = is_sharded(trainer.strategy.model or pl_module)
        if self._is_sharded:
            self.say("no device has the whole network: export a checkpoint instead, mlssl export FILE.")
        else:
            fitting_format(pl_module, self.format, self.network)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export after every n-th epoch."""
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._export(trainer, pl_module, f"{self.network}-epoch={trainer.current_epoch:02d}")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export the final weights, after averaging callbacks have replaced them in ``on_train_end``."""
        self._export(trainer, pl_module, self.network)

    def _export(self, trainer: L.Trainer, pl_module: L.LightningModule, stem: str) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run or self._is_sharded:  # type: ignore[attr-defined]
            return
        format = fitting_format(pl_module, self.format, self.network)
        folder = Path(self.directory or Path(trainer.default_root_dir) / "exports")
        report = None
        while report is None:
            path = _free_path(folder, stem, EXPORT_SUFFIXES[format][0])
            with suppress(FileExistsError):  # another process wrote it meanwhile
                report = export_backbone(pl_module, path, format, self.network)
        rank_zero_info(f"{self.network.capitalize()} exported to {report.path} ({format})")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                _log_artifact(logger, self.network, report.path, {**trainer.callback_metrics})


def _log_artifact(logger: WandbLogger, network: str, path: Path, metrics: Mapping[str, Any]) -> None:
    """Log the export as a versioned artifact of the run, with the current metrics."""
    import wandb

    artifact = wandb.Artifact(
        f"{network}-{logger.version}", type="model", metadata={name: float(value) for name, value in metrics.items()}
    )
    if path.is_dir():
        artifact.add_dir(str(path))
    else:
        artifact.add_file(str(path))
    logger.experiment.log_artifact(artifact)


def _free_path(folder: Path, stem: str, suffix: str) -> Path:
    path = folder / f"{stem}{suffix}"
    attempt = 0
    while path.exists():
        attempt += 1
        path = folder / f"{stem}-v{attempt}{suffix}"
    return path
