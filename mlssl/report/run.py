"""From the folder of a run to its page: curves from its log, and the network at its start and at its end."""

from __future__ import annotations

import csv
import os
import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
import yaml
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor

from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.records import Records
from mlssl.evaluation.geometry import map_2d
from mlssl.evaluation.neighbors import nearest_neighbors
from mlssl.module import MultiLabelSSLModule
from mlssl.report import figures
from mlssl.report.measure import Snapshot, measure, some_images
from mlssl.report.page import (
    SPRITE_COLUMNS,
    THUMBNAIL,
    FeatureMap,
    Neighbor,
    Page,
    Plot,
    data_address,
    sprite,
    write_page,
)
from mlssl.report.verdicts import has_collapsed, is_learning, waits_for_data

MAX_POINTS = 600
"""Images on the map: their pictures take half a megabyte, and more points would hide one another."""

NUM_QUERIES = 12
NUM_NEAREST = 5
NUM_VIEW_GRIDS = 2
START, END = "start of the run", "end of the run"


class Log(NamedTuple):
    """A quantity over a run: steps, epochs and values, of the same length."""

    steps: list[float]
    epochs: list[float]
    values: list[float]


def write_report(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    max_images: int = 2000,
    num_workers: int | None = None,
    progress: bool = False,
) -> Path:
    """Write one HTML file about a run of `mlssl fit`.

    The network is looked at twice on the run's own data: as its last checkpoint has it, and as the run's seed and
    settings built it, which is exactly what the run started from.

    Args:
        run: Its folder, with config.yaml, metrics.csv and checkpoints/.
        output: File to write, replaced if it exists; by default ``report.html`` in the run's folder.
        max_images: At most so many training and so many val images are looked at, evenly chosen; at least 2.
        num_workers: Loader processes; those of the run by default.
        progress: Whether to show bars with images a second.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If the folder, a file of it or the images are missing.
        ValueError: If max_images is below 2, the config is not one of a run, or the checkpoint does not fit it.
    """
    if max_images < 2:
        raise ValueError(f"max_images={max_images} was given: pass at least 2, or leave it out for 2000.")
    folder = Path(run)
    config, checkpoint = read_config(folder), last_checkpoint(folder)
    log = read_log(folder / "metrics.csv")
    seed = int(config["seed_everything"])
    data = MultiLabelDataModule(**config["data"], seed=seed)
    data.setup()
    assert data.train_records is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train = some_images(data.train_records, max_images)
    val = None if data.val_records is None else some_images(data.val_records, max_images)
    settings: dict[str, Any] = {
        "batch_size": config["data"]["batch_size"],
        "num_workers": (config["data"].get("num_workers") or 0) if num_workers is None else num_workers,
        "seed": seed,
        "progress": progress,
    }
    snapshots = {}
    for moment, model in ((END, _loaded(checkpoint)), (START, _untrained(config["model"], seed))):
        snapshots[moment] = measure(model.to(device), train, val, data.views, data.eval_size, **settings)
    shown = train if val is None else val
    page = _page(folder, config, log, snapshots[START], snapshots[END], data, train, shown)
    path = Path(output) if output is not None else folder / "report.html"
    write_page(page, path)
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """Settings of a run, from its config.yaml.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If it is not the config of a run.
    """
    path = folder / "config.yaml"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {str(folder)!r}: pass the folder of a run, such as runs/fit-20250101-120000"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"no config.yaml in {str(folder)!r}: pass the folder of a run that mlssl fit has written"
        )
    config = yaml.safe_load(path.read_text())
    if not isinstance(config, dict) or not {"seed_everything", "model", "data", "trainer"} <= config.keys():
        raise ValueError(f"{str(path)!r} is not the config of a run: pass the folder of one that mlssl fit has written")
    for name in ("eval_size", "min_images_per_class"):
        if isinstance(config["data"].get(name), list):
            config["data"][name] = tuple(config["data"][name])
    return config


def last_checkpoint(folder: Path) -> Path:
    """``checkpoints/last.ckpt`` of a run, or the latest where there is none of that name.

    Raises:
        FileNotFoundError: If there is no checkpoint.
    """
    found = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    last = [path for path in found if path.name == "last.ckpt"]
    if not found:
        raise FileNotFoundError(f"no checkpoint in {str(folder / 'checkpoints')!r}: the run has not saved any yet")
    return (last or found)[-1]


def read_log(path: Path) -> dict[str, Log]:
    """Every quantity of metrics.csv.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    log: dict[str, Log] = defaultdict(lambda: Log([], [], []))
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    log[name].steps.append(float(row["step"] or 0))
                    log[name].epochs.append(float(row.get("epoch") or 0))
                    log[name].values.append(float(value))
    return dict(log)


def _loaded(checkpoint: Path) -> MultiLabelSSLModule:
    try:
        return MultiLabelSSLModule.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{checkpoint} does not load as a checkpoint of MultiLabelSSLModule: was it cut off?"
        ) from error


def _untrained(settings: dict[str, Any], seed: int) -> MultiLabelSSLModule:
    with isolate_rng():
        L.seed_everything(seed, verbose=False)
        return MultiLabelSSLModule(**settings)


# ---------------------------------------------------------------------- what stands on the page


def _page(
    folder: Path,
    config: dict[str, Any],
    log: dict[str, Log],
    start: Snapshot,
    end: Snapshot,
    data: MultiLabelDataModule,
    train: Records,
    shown: Records,
) -> Page:
    from mlssl import __version__

    feature_map = _feature_map(end, shown)
    return Page(
        title=folder.resolve().name,
        subtitle=f"{config['model']['backbone']} on {len(_train(data)):,} images of {config['data']['dataset']}",
        verdicts=[
            is_learning(_map_of(start), _map_of(end), _gap(start), _gap(end)),
            has_collapsed(end.spread, end.view_rank, end.num_views),
            waits_for_data(*(_median(log, name) for name in ("time/data", "time/step", "throughput/images_per_s"))),
        ],
        facts=_facts(config, log, data),
        curves=_curves(log),
        quality=_quality(log, start, end, shown),
        geometry=_geometry(start, end, len(shown)),
        view_grids=_view_grids(folder),
        neighbors=_neighbors(end, shown),
        feature_map=feature_map,
        notes=_notes(start, end, data, train, shown),
        version=__version__,
    )


def _facts(config: dict[str, Any], log: dict[str, Log], data: MultiLabelDataModule) -> dict[str, str]:
    settings, model, trainer = config["data"], config["model"], config["trainer"]
    loss = log.get("train/loss", Log([], [], []))
    val = data.val_records
    epochs = f"{int(max(loss.epochs, default=-1)) + 1}"
    if trainer.get("max_epochs"):
        epochs += f" of {trainer['max_epochs']}"
    facts = {
        "backbone": str(model["backbone"]),
        "training images": f"{len(_train(data)):,}",
        "val images": "none" if val is None else f"{len(val):,}",
        "labels": str(data.num_labels) if data.num_labels else "none",
        "epochs": epochs,
        "last logged step": f"{int(max(loss.steps, default=0)):,}",
        "batch size (a device)": str(settings["batch_size"]),
        "views": f"{settings['size']} × {settings['size']}",
        "grid": f"{settings['rows']} × {settings['cols']}, overlap {settings['overlap']:g}",
        "optimizer": f"{model['optimizer']}, base_lr {model['base_lr']:g}",
        "seed": str(config["seed_everything"]),
    }
    if loss.values:
        facts["loss, first → last"] = f"{loss.values[0]:.3f} → {loss.values[-1]:.3f}"
    return facts


def _curves(log: dict[str, Log]) -> list[Plot]:
    plots = []
    losses = {
        title: _over_steps(log[name])
        for title, name in (
            ("total", "train/loss"),
            ("image-aware", "train/image_aware_loss"),
            ("pair", "train/pair_loss"),
        )
        if name in log
    }
    if losses:
        figure = figures.figure_of_curves(losses, "loss")
        caption = "Total = pair term + contrastive_weight × image-aware term. The pair term cannot fall below −1."
        plots.append(Plot("loss", "Loss", caption, figures.svg(figure, "loss")))
    rates = {name.removeprefix("lr-"): _over_steps(log[name]) for name in sorted(log) if name.startswith("lr-")}
    if rates:
        # Groups of one rate lie on each other: one of them is enough.
        different = {tuple(curve[1]): (name, curve) for name, curve in reversed(rates.items())}
        figure = figures.figure_of_curves(dict(reversed(different.values())), "learning rate")
        plots.append(Plot("lr", "Learning rate", "As the optimizer used it.", figures.svg(figure, "lr")))
    if "throughput/images_per_s" in log:
        figure = figures.figure_of_curves({"images a second": _over_steps(log["throughput/images_per_s"])}, "images/s")
        caption = "Images, not views, of all devices; means over 50 steps."
        plots.append(Plot("speed", "Speed", caption, figures.svg(figure, "speed")))
    if {"time/data", "time/step"} <= log.keys():
        times = {"waiting for data": _over_steps(log["time/data"]), "computing": _over_steps(log["time/step"])}
        figure = figures.figure_of_curves(times, "seconds a step")
        plots.append(
            Plot("time", "Where the time goes", "Means over 50 steps, on one device.", figures.svg(figure, "time"))
        )
    return plots


def _quality(log: dict[str, Log], start: Snapshot, end: Snapshot, shown: Records) -> list[Plot]:
    plots = []
    curves = {
        title: (log[name].epochs, log[name].values)
        for title, name in (("online probe", "probe/mAP"), ("online kNN", "knn/mAP"))
        if name in log
    }
    levels = {}
    if start.probe is not None and end.probe is not None and start.knn is not None and end.knn is not None:
        levels = {"probe, start": start.probe.mAP, "probe, end": end.probe.mAP}
        levels |= {"kNN, start": start.knn, "kNN, end": end.knn}
    if curves or levels:
        figure = figures.figure_of_curves(curves, "mAP on the val images", "epoch", levels)
        words = "Lines with points: what the run logged about itself. "
        if levels:
            words = (
                "Dashed: a linear probe and the votes of the nearest training images, on frozen features, "
                f"start → end: probe {levels['probe, start']:.3f} → {levels['probe, end']:.3f}, "
                f"kNN {levels['kNN, start']:.3f} → {levels['kNN, end']:.3f}. "
            ) + (words if curves else "")
        plots.append(Plot("quality", "Probe and nearest neighbours", words, figures.svg(figure, "quality")))
    if start.probe is not None and end.probe is not None:
        precisions = {START: start.probe.average_precision, END: end.probe.average_precision}
        order = end.probe.average_precision.nan_to_num(-1).argsort(descending=True).tolist()
        order = [place for place in order if end.probe.average_precision[place].isfinite()]
        positives = (end.features.labels == 1).sum(0) if end.features.labels is not None else None
        table = {
            "class": [shown.classes[place] for place in order],
            "images": ["" if positives is None else str(int(positives[place])) for place in order],
            "start": [f"{start.probe.average_precision[place].item():.3f}" for place in order],
            "end": [f"{end.probe.average_precision[place].item():.3f}" for place in order],
        }
        caption = "Average precision of each class by the linear probe; bars: the end of the run, strokes: its start."
        figure = figures.figure_of_classes(precisions)
        plots.append(Plot("classes", "Each class", caption, figures.svg(figure, "classes"), table))
    return plots


def _geometry(start: Snapshot, end: Snapshot, num_images: int) -> list[Plot]:
    cosines = figures.figure_of_cosines({"start": start.cosines, "end": end.cosines})
    means = ", ".join(
        f"{figures.KINDS[kind]} {values.mean().item():.2f} (start {start.cosines[kind].mean().item():.2f})"
        for kind, values in end.cosines.items()
    )
    spectra = figures.figure_of_spectra({"start": start.spectrum, "end": end.spectrum})
    return [
        Plot(
            "cosines",
            "How alike are views?",
            f"Cosines of the projections of views of training images. Means at the end: {means}. The three should be "
            "ordered, and other images apart from the rest.",
            figures.svg(cosines, "cosines"),
        ),
        Plot(
            "spectrum",
            "Directions that the features use",
            f"Singular values of the features of {num_images:,} images about their mean. Effective rank "
            f"{end.rank:.0f} of {len(end.spectrum)} (start {start.rank:.0f}).",
            figures.svg(spectra, "spectrum"),
        ),
    ]


def _feature_map(end: Snapshot, shown: Records) -> FeatureMap:
    lines = np.unique(np.linspace(0, len(shown) - 1, MAX_POINTS).round().astype(int))
    places, shares = map_2d(end.features.features[torch.from_numpy(lines)])
    order = np.zeros(0, int)
    groups = [-1] * len(lines)
    if shown.labels is not None:
        present = shown.labels[lines] == 1
        order = np.argsort(-present.sum(0), kind="stable")
        order = order[present.sum(0)[order] > 0]
        # The rarest of the frequent labels of an image says most about it.
        groups = [next((g for g in range(min(8, len(order)) - 1, -1, -1) if row[order[g]]), -1) for row in present]
    names = [shown.classes[column] for column in order]
    figure = figures.figure_of_map(places, shares, groups, names[:8])
    points = [
        {
            "name": shown.path(line).name,
            "labels": [name for name, _ in _labels(shown, line)],
            "classes": [] if shown.labels is None else np.flatnonzero(shown.labels[line][order] == 1).tolist(),
        }
        for line in lines.tolist()
    ]
    caption = (
        f"{len(lines):,} images on the two directions along which their features vary most (PCA of unit vectors). "
        "Point at one to see it."
    )
    if names:
        caption += " An image is coloured by the rarest of the eight most frequent labels that it shows."
    plot = Plot("map", "Map of the images", caption, figures.svg(figure, "map"))
    images = [shown.image(line) for line in lines.tolist()]
    return FeatureMap(plot, sprite(images), SPRITE_COLUMNS, THUMBNAIL, points, names)


def _neighbors(end: Snapshot, shown: Records) -> list[list[Neighbor]]:
    if len(shown) < 2:
        return []
    queries = np.unique(np.linspace(0, len(shown) - 1, NUM_QUERIES + 2).round().astype(int))
    queries = queries[1:-1] if len(queries) > 2 else queries  # the first of a set are often of one kind
    lines = torch.from_numpy(queries)
    ids = end.features.image_ids
    found = nearest_neighbors(
        end.features.features[lines],
        end.features.features,
        min(NUM_NEAREST, len(shown) - 1),
        query_ids=ids[lines],
        bank_ids=ids,
    )
    return [
        [
            _neighbor(shown, query, query, None),
            *(
                _neighbor(shown, line, query, cosine)
                for line, cosine in zip(near.tolist(), similar.tolist(), strict=True)
            ),
        ]
        for query, near, similar in zip(queries.tolist(), found.indices, found.similarities, strict=True)
    ]


def _neighbor(shown: Records, line: int, query: int, cosine: float | None) -> Neighbor:
    shared = {name for name, _ in _labels(shown, query)} if line != query else set()
    labels = [(name, name in shared) for name, _ in _labels(shown, line)]
    return Neighbor(data_address(shown.image(line), 132), shown.path(line).name, labels, cosine)


def _labels(records: Records, line: int, most: int = 6) -> list[tuple[str, int]]:
    if records.labels is None:
        return []
    columns = np.flatnonzero(records.labels[line] == 1)[:most].tolist()
    return [(records.classes[column], column) for column in columns]


def _view_grids(folder: Path) -> list[tuple[str, str]]:
    grids = []
    for path in sorted((folder / "views").glob("*.png"))[:NUM_VIEW_GRIDS]:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        words = f"A training image ({path.stem}) with its blocks, and beside it the views of each block"
        grids.append((data_address(pixels, 1400, 82), words))
    return grids


def _notes(start: Snapshot, end: Snapshot, data: MultiLabelDataModule, train: Records, shown: Records) -> list[str]:
    if start.probe is None or end.probe is None:
        return [
            "Without labels in the training and the val set there is no probe. What the features are good for shows in "
            "the neighbours below."
        ]
    strengths = f"{start.probe.strength:.2g} at the start, {end.probe.strength:.2g} at the end"
    return [
        f"The probe learned from {len(train):,} of {len(_train(data)):,} training images and was scored on "
        f"{len(shown):,} val images, in {end.probe.num_classes} classes that these show, with average pooling; how "
        f"strongly it is regularised was chosen on a fifth of the training images ({strengths})."
    ]


def _train(data: MultiLabelDataModule) -> Records:
    assert data.train_records is not None
    return data.train_records


def _map_of(snapshot: Snapshot) -> float | None:
    return None if snapshot.probe is None else snapshot.probe.mAP


def _gap(snapshot: Snapshot) -> float:
    within = torch.cat([snapshot.cosines[kind] for kind in ("same_block", "same_image") if kind in snapshot.cosines])
    between: Tensor = snapshot.cosines["other_image"]
    return (within.mean() - between.mean()).item()


def _median(log: dict[str, Log], name: str) -> float | None:
    return float(np.median(log[name].values)) if name in log else None


def _over_steps(log: Log) -> tuple[list[float], list[float]]:
    return log.steps, log.values
