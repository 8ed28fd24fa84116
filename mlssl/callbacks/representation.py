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
    ``representation/classes``, a table of each class with its average precision by a linear probe (with labels in the
    training and the val set), ``representation/neighbors``, a table of a dozen images and their five nearest,
    ``representation/map``, coordinates along the two directions of largest variance, and a figure of each.

    Another `network` than the backbone is shown in the same way, with its features in place of the projections, as
    ``similarity/<network>/same_block`` and so on.

    Weights, buffers and random state stay as they are. Needs a datamodule that is an `mlssl.contracts.EvaluationData`,
    as `MultiLabelDataModule` is; with any other, and where FSDP shards the network, one line says that nothing is
    shown.

    Args:
        max_images: Most training and most val images that are measured when the fit ends; at least 2.
        network: Name of the submodule that is shown, from normalised images to features (n, D).

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
        """Find out whether this device has the network."""
        self._is_sharded = is_sharded(trainer.strategy.model or pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the cosines that the run begins with."""
        self._log_cosines(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the cosines once more."""
        if not trainer.sanity_checking:
            self._log_cosines(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure whole images, and log plots and tables."""
        data = self._source(trainer)
        if data is None:
            return
        train, val = (
            None if records is None else some_images(records, self.max_images)
            for records in (data.train_records, data.val_records)
        )
        assert train is not None  # as _source has seen
        with isolate_rng():
            snapshot = measure(
                self._shown(pl_module),
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
        data = self._source(trainer)
        if data is None or data.train_records is None:
            return
        # On all devices, because synchronised batch norms wait for each other; only the first one logs.
        with isolate_rng():
            z = view_projections(self._shown(pl_module), data.train_records, data.views, batch_size_of(trainer))
            cosines = pair_cosines(z)
        for logger in _wandb_loggers(trainer):
            _log(logger, _histogram_entries(cosines), self.metric, trainer.global_step)

    def _source(self, trainer: L.Trainer) -> EvaluationData | None:
        if not any(isinstance(logger, WandbLogger) for logger in trainer.loggers) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        data = evaluation_data(trainer)
        if self._is_sharded:
            self.say("nothing is shown, because no device has the whole network.")
            return None
        if data is None or data.train_records is None:
            self.say("nothing is shown, because the run has no datamodule with train_records, views and eval_size.")
            return None
        return data

    def _shown(self, pl_module: L.LightningModule) -> _Shown:
        network = self.network_of(pl_module)
        if network is None:
            raise TypeError(
                f"RepresentationLogger needs `backbone` and `normalize`, and {type(pl_module).__name__} lacks one: use "
                "MultiLabelSSLModule, or leave the callback out."
            )
        projector = pl_module.get_submodule("projector") if self.is_of_backbone else nn.Identity()
        return _Shown(network.backbone, network.normalize, projector)


@dataclass
class _Shown:
    """A network and the projector whose outputs are compared."""

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

    shown = snapshot.images
    entries: dict[str, Any] = {"similarity/figure": wandb.Image(figure_of_cosines({"end": snapshot.cosines}))}
    if snapshot.probe is not None and snapshot.features.labels is not None:
        precisions = snapshot.probe.average_precision
        positives = (snapshot.features.labels == 1).sum(0)
        rows = [
            [name, int(number), float(value)]
            for name, number, value in zip(shown.classes, positives, precisions, strict=True)
            if value.isfinite()
        ]
        entries["representation/classes"] = wandb.Table(["class", "images", "average precision"], rows)
        entries["representation/classes_figure"] = wandb.Image(figure_of_classes({"linear probe": precisions}))
    entries |= {"representation/neighbors": _neighbor_table(snapshot, shown), **_map_entries(snapshot, shown)}
    entries["representation/rank"] = snapshot.rank
    return entries


def _neighbor_table(snapshot: Snapshot, shown: Records) -> Any:
    import wandb

    near = min(NUM_NEAREST, len(shown) - 1)
    table = wandb.Table(["image", "labels", *(f"nearest {rank + 1}" for rank in range(near))])
    if near < 1:
        return table
    queries, found = nearest_of_some(snapshot.features, NUM_QUERIES, NUM_NEAREST)
    for query, nearest, cosines in zip(queries.tolist(), found.indices, found.similarities, strict=True):
        others = [
            wandb.Image(picture(shown, index), caption=f"{cosine:.2f} {_words(shown, index)}")
            for index, cosine in zip(nearest.tolist(), cosines.tolist(), strict=True)
        ]
        table.add_data(wandb.Image(picture(shown, query)), _words(shown, query), *others)
    return table


def _map_entries(snapshot: Snapshot, shown: Records) -> dict[str, Any]:
    import wandb

    indices = spread_indices(len(shown), MAX_POINTS)
    positions, shares = map_2d(snapshot.features.features[torch.from_numpy(indices)])
    rows = [
        [shown.path(index).name, _words(shown, index), *rank]
        for index, rank in zip(indices.tolist(), positions.tolist(), strict=True)
    ]
    figure = figure_of_map(positions, shares, [-1] * len(indices), [])
    return {
        "representation/map": wandb.Table(["image", "labels", "x", "y"], rows),
        "representation/map_figure": wandb.Image(figure),
    }


def _words(records: Records, index: int) -> str:
    return ", ".join(label_names(records, index))


def _wandb_loggers(trainer: L.Trainer) -> list[WandbLogger]:
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
