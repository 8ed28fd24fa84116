"""Pictures and tables of the representation on Weights & Biases: cosines, classes, neighbours, a map."""

from __future__ import annotations

from typing import Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from mlssl.data.records import Records
from mlssl.distributed import is_sharded
from mlssl.drawing.run import figure_of_classes, figure_of_cosines, figure_of_map
from mlssl.evaluation.geometry import map_2d, pair_cosines
from mlssl.report.measure import (
    ProjectingNetwork,
    Snapshot,
    label_names,
    measure,
    nearest_of_some,
    picture,
    some_images,
    spread_lines,
    view_projections,
)
from mlssl.views.blocks import BlockViews

NUM_QUERIES = 12
NUM_NEAREST = 5
MAX_POINTS = 600
BINS = 50


class RepresentationLogger(L.Callback):
    """Show on Weights & Biases how the representation lies; without a ``WandbLogger`` it does nothing.

    At the start of a run and after each validation: ``similarity/same_block``, ``similarity/same_image`` and
    ``similarity/other_image``, histograms of cosines of projections of views. When the fit ends, on whole images:
    ``representation/classes``, a table of each class with its average precision by a linear probe (with labels in the
    training and the val set), ``representation/neighbors``, a table of a dozen images and their five nearest,
    ``representation/map``, places on the two directions along which features vary most, and a figure of each.

    Weights, buffers and random state stay as they are. Needs a datamodule with ``train_records``, ``val_records``,
    ``views`` and ``eval_size``, as `MultiLabelDataModule` is; with any other, and where FSDP shards the network, one
    line says that nothing is shown.

    Args:
        max_images: Training and val images that are looked at when the fit ends, at most; at least 2.

    Raises:
        ValueError: If max_images is below 2.
    """

    def __init__(self, max_images: int = 2000) -> None:
        if max_images < 2:
            raise ValueError(f"max_images={max_images} was given: pass at least 2, or leave RepresentationLogger out.")
        self.max_images = max_images
        self._said = False
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
        """Look at whole images, and show what is found."""
        source = self._source(trainer)
        if source is None:
            return
        train, val, views, eval_size = source
        train = some_images(train, self.max_images)
        val = None if val is None else some_images(val, self.max_images)
        with isolate_rng():
            snapshot = measure(
                _network(pl_module),
                train,
                val,
                views,
                eval_size,
                batch_size=_batch_size(trainer),
                num_workers=_workers(trainer),
            )
        for logger in _wandb_loggers(trainer):
            _log_snapshot(logger, snapshot, trainer.global_step)

    def _log_cosines(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        source = self._source(trainer)
        if source is None:
            return
        train, _, views, _ = source
        # On all devices, because synchronised batch norms wait for each other; only the first one logs.
        with isolate_rng():
            cosines = pair_cosines(view_projections(_network(pl_module), train, views, _batch_size(trainer)))
        for logger in _wandb_loggers(trainer):
            _log_histograms(logger, cosines, trainer.global_step)

    def _source(self, trainer: L.Trainer) -> tuple[Records, Records | None, BlockViews, tuple[int, int]] | None:
        if not any(isinstance(logger, WandbLogger) for logger in trainer.loggers) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        train, val, views, size = (
            getattr(datamodule, name, None) for name in ("train_records", "val_records", "views", "eval_size")
        )
        if self._is_sharded:
            self._say("no device has the whole network.")
            return None
        if not isinstance(train, Records) or not isinstance(views, BlockViews) or size is None:
            self._say("the run has no datamodule with train_records, val_records, views and eval_size.")
            return None
        return train, val if isinstance(val, Records) else None, views, size

    def _say(self, why: str) -> None:
        if not self._said:
            rank_zero_info(f"RepresentationLogger: nothing is shown, because {why}")
            self._said = True


def _log_histograms(logger: WandbLogger, cosines: dict[str, torch.Tensor], step: int) -> None:
    import wandb

    edges = np.linspace(-1, 1, BINS + 1)
    histograms = {
        f"similarity/{kind}": wandb.Histogram(np_histogram=(torch.histc(values, BINS, -1, 1).long().numpy(), edges))
        for kind, values in cosines.items()
    }
    logger.experiment.log({**histograms, "trainer/global_step": step})


def _log_snapshot(logger: WandbLogger, snapshot: Snapshot, step: int) -> None:
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
    logger.experiment.log({**entries, "trainer/global_step": step})


def _neighbor_table(snapshot: Snapshot, shown: Records) -> Any:
    import wandb

    near = min(NUM_NEAREST, len(shown) - 1)
    table = wandb.Table(["image", "labels", *(f"nearest {place + 1}" for place in range(near))])
    if near < 1:
        return table
    queries, found = nearest_of_some(snapshot.features, NUM_QUERIES, NUM_NEAREST)
    for query, nearest, cosines in zip(queries.tolist(), found.indices, found.similarities, strict=True):
        others = [
            wandb.Image(picture(shown, line), caption=f"{cosine:.2f} {_words(shown, line)}")
            for line, cosine in zip(nearest.tolist(), cosines.tolist(), strict=True)
        ]
        table.add_data(wandb.Image(picture(shown, query)), _words(shown, query), *others)
    return table


def _map_entries(snapshot: Snapshot, shown: Records) -> dict[str, Any]:
    import wandb

    lines = spread_lines(len(shown), MAX_POINTS)
    places, shares = map_2d(snapshot.features.features[torch.from_numpy(lines)])
    rows = [
        [shown.path(line).name, _words(shown, line), *place]
        for line, place in zip(lines.tolist(), places.tolist(), strict=True)
    ]
    figure = figure_of_map(places, shares, [-1] * len(lines), [])
    return {
        "representation/map": wandb.Table(["image", "labels", "x", "y"], rows),
        "representation/map_figure": wandb.Image(figure),
    }


def _words(records: Records, line: int) -> str:
    return ", ".join(label_names(records, line))


def _wandb_loggers(trainer: L.Trainer) -> list[WandbLogger]:
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _network(pl_module: L.LightningModule) -> ProjectingNetwork:
    return cast(ProjectingNetwork, pl_module)


def _batch_size(trainer: L.Trainer) -> int:
    size = getattr(trainer.train_dataloader, "batch_size", None)
    return size if isinstance(size, int) else 32


def _workers(trainer: L.Trainer) -> int:
    return getattr(trainer.train_dataloader, "num_workers", 0)
