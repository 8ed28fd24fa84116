"""Plots and tables of the representation on Weights & Biases: cosines, classes, neighbours, a map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from mlssl.callbacks.networks import BACKBONE, NetworkCallback, batch_size_of, evaluation_data, workers_of
from mlssl.contracts import EvaluationData
from mlssl.data.records import Records
from mlssl.distributed import is_sharded
from mlssl.drawing.run import figure_of_classes, figure_of_cosines, figure_of_map
from mlssl.evaluation.geometry import map_2d, pair_cosines
from mlssl.report.measure import (
    Snapshot,
    label_names,
    measure,
    nearest_of_some,
    picture,
    some_images,
    spread_indices,
    view_projections,
)

NUM_QUERIES = 12
NUM_NEAREST = 5
MAX_POINTS = 600
BINS = 50


class RepresentationLogger(NetworkCallback):
    """Log plots and tables of the representation to Weights & Biases; does nothing without a ``WandbLogger``.

    At the start of a run and after each validation: ``similarity/same_block``, ``similarity/same_image`` and
    ``similarity/other_image``, histograms of cosines of projections of views. When the fit ends, on whole images:
    ``representation/classes``, a table of each class and its average precision by a linear probe (with labels in the
    training and the val set), ``representation/neighbors``, a table of a dozen images and their five nearest,
    ``representation/map``, coordinates along the two directions of largest variance, and a figure of each.

    Another `network` than the backbone is logged in the same way, with its features in place of the projections, as
    ``similarity/<network>/same_block`` and so on.

    Weights, buffers and random state do not change. Needs a datamodule that is an `mlssl.contracts.EvaluationData`,
    as `MultiLabelDataModule` is; with any other, and if FSDP shards the network, one line says that nothing is logged.

    Args:
        max_images: Maximum number of training images, and of val images, measured at the end of the fit; at least 2.
        network: Name of the submodule to measure, from normalised images to features (n, D).

    Raises:
        ValueError: If max_images is below 2; before the run, if the module has no such network.
        TypeError: If there is another network, and the model has no ``normalize`` for its images.
    """

    def __init__(self, max_images: int = 2000, network: str = BACKBONE) -> None:
        super().__init__(network)
        if max_images < 2:
            raise ValueError(f"max_images={max_images} was given: pass at least 2, or leave RepresentationLogger out.")
        self.max_images = max_images
        self._is_sharded = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check whether this device has the network."""
        self._is_sharded = is_sharded(trainer.strategy.model or pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the cosines at the start."""
        self._log_cosines(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the cosines again."""
        if not trainer.sanity_checking:
            self._log_cosines(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure whole images, and log plots and tables."""
        data = self._data(trainer)
        if data is None:
            return
        train, val = (
            None if records is None else some_images(records, self.max_images)
            for records in (data.train_records, data.val_records)
        )
        assert train is not None  # checked by _source
        with isolate_rng():
            snapshot = measure(
                self._network(pl_module),
                train,
                val,
                data.views,
                data.eval_size,
                batch_size=batch_size_of(trainer),
                num_workers=workers_of(trainer),
            )
        for logger in _wandb_loggers(trainer):
            _log(logger, _snapshot_entries(snapshot), self.metric, trainer.global_step)

    def _log_cosines(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = self._data(trainer)
        if data is None or data.train_records is None:
            return
        # On all devices, because synchronised batch norms wait for each other; only the first one logs.
        with isolate_rng():
            z = view_projections(self._network(pl_module), data.train_records, data.views, batch_size_of(trainer))
            cosines = pair_cosines(z)
        for logger in _wandb_loggers(trainer):
            _log(logger, _histogram_entries(cosines), self.metric, trainer.global_step)

    def _data(self, trainer: L.Trainer) -> EvaluationData | None:
        if not any(isinstance(logger, WandbLogger) for logger in trainer.loggers) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        data = evaluation_data(trainer)
        if self._is_sharded:
            self.say("nothing is logged: no device has the whole network.")
            return None
        if data is None or data.train_records is None:
            self.say("nothing is logged: the run has no datamodule with train_records, views and eval_size.")
            return None
        return data

    def _network(self, pl_module: L.LightningModule) -> _Measured:
        network = self.network_of(pl_module)
        if network is None:
            raise TypeError(
                f"RepresentationLogger needs `backbone` and `normalize`, but {type(pl_module).__name__} lacks one: use "
                "MultiLabelSSLModule, or leave the callback out."
            )
        projector = pl_module.get_submodule("projector") if self.is_of_backbone else nn.Identity()
        return _Measured(network.backbone, network.normalize, projector)


@dataclass
class _Measured:
    """A network, and the projector whose outputs are compared."""

    backbone: nn.Module
    normalize: Callable[[Tensor], Tensor]
    projector: nn.Module


def _log(logger: WandbLogger, entries: dict[str, Any], metric: Callable[[str], str], step: int) -> None:
    logger.experiment.log({**{metric(name): entry for name, entry in entries.items()}, "trainer/global_step": step})


def _histogram_entries(cosines: dict[str, Tensor]) -> dict[str, Any]:
    import wandb

    edges = np.linspace(-1, 1, BINS + 1)
    return {
        f"similarity/{kind}": wandb.Histogram(np_histogram=(torch.histc(values, BINS, -1, 1).long().numpy(), edges))
        for kind, values in cosines.items()
    }


def _snapshot_entries(snapshot: Snapshot) -> dict[str, Any]:
    import wandb

    records = snapshot.images
    entries: dict[str, Any] = {"similarity/figure": wandb.Image(figure_of_cosines({"end": snapshot.cosines}))}
    if snapshot.probe is not None and snapshot.features.labels is not None:
        precisions = snapshot.probe.average_precision
        positives = (snapshot.features.labels == 1).sum(0)
        rows = [
            [name, int(number), float(value)]
            for name, number, value in zip(records.classes, positives, precisions, strict=True)
            if value.isfinite()
        ]
        entries["representation/classes"] = wandb.Table(["class", "images", "average precision"], rows)
        entries["representation/classes_figure"] = wandb.Image(figure_of_classes({"linear probe": precisions}))
    entries |= {"representation/neighbors": _neighbor_table(snapshot, records), **_map_entries(snapshot, records)}
    entries["representation/rank"] = snapshot.rank
    return entries


def _neighbor_table(snapshot: Snapshot, records: Records) -> Any:
    import wandb

    num_nearest = min(NUM_NEAREST, len(records) - 1)
    table = wandb.Table(["image", "labels", *(f"nearest {rank + 1}" for rank in range(num_nearest))])
    if num_nearest < 1:
        return table
    queries, neighbours = nearest_of_some(snapshot.features, NUM_QUERIES, NUM_NEAREST)
    for query, nearest, cosines in zip(queries.tolist(), neighbours.indices, neighbours.similarities, strict=True):
        pictures = [
            wandb.Image(picture(records, index), caption=f"{cosine:.2f} {_label_text(records, index)}")
            for index, cosine in zip(nearest.tolist(), cosines.tolist(), strict=True)
        ]
        table.add_data(wandb.Image(picture(records, query)), _label_text(records, query), *pictures)
    return table


def _map_entries(snapshot: Snapshot, records: Records) -> dict[str, Any]:
    import wandb

    indices = spread_indices(len(records), MAX_POINTS)
    positions, shares = map_2d(snapshot.features.features[torch.from_numpy(indices)])
    rows = [
        [records.path(index).name, _label_text(records, index), *rank]
        for index, rank in zip(indices.tolist(), positions.tolist(), strict=True)
    ]
    figure = figure_of_map(positions, shares, [-1] * len(indices), [])
    return {
        "representation/map": wandb.Table(["image", "labels", "x", "y"], rows),
        "representation/map_figure": wandb.Image(figure),
    }


def _label_text(records: Records, index: int) -> str:
    return ", ".join(label_names(records, index))


def _wandb_loggers(trainer: L.Trainer) -> list[WandbLogger]:
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
