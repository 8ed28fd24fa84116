"""Contents of a run's report: verdicts, facts and plots from its log and two snapshots of its network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mlssl.data.records import Records
from mlssl.drawing import run as figures
from mlssl.evaluation.classes import FEW_POSITIVES, ClassCounts
from mlssl.evaluation.geometry import directions_of_variance, map_2d, neighbor_map
from mlssl.report.facts import backbone_name, facts_of, images_of, steps_taken
from mlssl.report.measure import Snapshot, label_names, nearest_of_some, picture, spread_indices
from mlssl.report.page import SPRITE_COLUMNS, THUMBNAIL, FeatureMap, Neighbor, Page, Plot, data_address, sprite
from mlssl.report.verdicts import has_collapsed, is_learning, waits_for_data
from mlssl.run_folder import Log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POINTS = 600
"""Maximum number of images on the map: their thumbnails take half a megabyte, and more points would overlap."""

NUM_QUERIES = 12
NUM_NEAREST = 5
NUM_VIEW_GRIDS = 2
MAX_LABELS = 6  # per image; more do not fit in a caption
START, END = "start of the run", "end of the run"


class Measurements(NamedTuple):
    """Measurements of a run's network, and their images."""

    start: Snapshot
    """The initial network."""
    end: Snapshot
    """The trained network."""
    all_train: Records
    """All training images of the run."""
    all_val: Records | None
    train: Records
    """Training images that were measured."""


def build_page(
    folder: Path,
    config: dict[str, Any],
    log: dict[str, Log],
    measurements: Measurements | None,
    notes: Sequence[str] = (),
) -> Page:
    """Build the page.

    Args:
        folder: Run folder, with the images of its views.
        config: Settings of the run, as in its config.yaml.
        log: Metric → logged values.
        measurements: Measurements of the network; None shows only the log.
        notes: Sentences on how the network was measured.
    """
    settings: dict[str, Any] = {
        "title": folder.resolve().name,
        "facts": facts_of(folder, config, log)
        | (images_of(measurements.all_train, measurements.all_val) if measurements else {}),
        "curves": _curves(log),
        "view_grids": _view_grids(folder),
        "version": version("mlssl"),
    }
    waits = waits_for_data(*(_median(log, name) for name in ("time/data", "time/step", "throughput/images_per_s")))
    dataset = config["data"].get("dataset") or config.get("data_class")
    if measurements is None:
        return Page(subtitle=f"on {dataset}", verdicts=[waits], quality=_quality(log, {}), notes=notes, **settings)
    start, end = measurements.start, measurements.end
    steps = steps_taken(log)
    return Page(
        subtitle=f"{backbone_name(config)} on {len(measurements.all_train):,} images of {dataset}",
        verdicts=[
            is_learning(_map_of(start), _map_of(end), _gap(start), _gap(end), steps),
            has_collapsed(end.spread, end.view_rank, end.num_views, steps),
            waits,
        ],
        quality=[*_quality(log, _levels(start, end)), *_classes(start, end)],
        geometry=_geometry(start, end, len(end.images)),
        neighbors=_neighbors(end, end.images),
        feature_map=_feature_map(end, end.images),
        notes=[*_notes(measurements), *notes],
        **settings,
    )


def plot_of(name: str, title: str, caption: str, figure: Figure, table: dict[str, list[str]] | None = None) -> Plot:
    """A figure with the tooltips of its points."""
    drawn = figures.svg(figure, name)
    return Plot(name, title, caption, drawn, table, figures.hover_points(figure))


LOSSES = {"train/loss": "total", "train/image_aware_loss": "image-aware", "train/pair_loss": "pair"}
"""Logged losses with a panel each → label of its axis."""


def _curves(log: dict[str, Log]) -> list[Plot]:
    plots = []
    losses = {title: {title: _over_steps(log[name])} for name, title in LOSSES.items() if name in log}
    if losses:
        caption = "Total = pair term + contrastive_weight × image-aware term. The pair term cannot fall below −1."
        plots.append(plot_of("loss", "Loss", caption, figures.figure_of_panels(losses)))
    if "train/lr" in log:
        rate = {"learning rate": _over_steps(log["train/lr"])}
        figure = figures.figure_of_curves(rate, "learning rate", from_zero=True)
        plots.append(plot_of("lr", "Learning rate", "As used in each step, scaled by the views per step.", figure))
    if "throughput/images_per_s" in log:
        speed = {"images per second": _over_steps(log["throughput/images_per_s"])}
        figure = figures.figure_of_curves(speed, "images/s", from_zero=True)
        plots.append(plot_of("speed", "Speed", "Images, not views, of all devices; means over 50 steps.", figure))
    if {"time/data", "time/step"} <= log.keys():
        times = {"waiting for data": _over_steps(log["time/data"]), "computing": _over_steps(log["time/step"])}
        figure = figures.figure_of_curves(times, "seconds per step", from_zero=True)
        plots.append(plot_of("time", "Where the time goes", "Means over 50 steps, on one device.", figure))
    return plots


def _quality(log: dict[str, Log], levels: Mapping[str, float]) -> list[Plot]:
    curves = {
        title: (log[name].epochs, log[name].values)
        for title, name in (("online probe", "probe/mAP"), ("online kNN", "knn/mAP"))
        if name in log
    }
    if not curves and not levels:
        return []
    figure = figures.figure_of_curves(curves, "mAP on the val images", "epoch", levels)
    words = "Lines with markers: logged during the run. "
    if levels:
        words = (
            "Dashed: linear probe and kNN on frozen features, "
            f"start → end: probe {levels['probe, start']:.3f} → {levels['probe, end']:.3f}, "
            f"kNN {levels['kNN, start']:.3f} → {levels['kNN, end']:.3f}. "
        ) + (words if curves else "")
    return [plot_of("quality", "Probe and nearest neighbours", words, figure)]


def _levels(start: Snapshot, end: Snapshot) -> dict[str, float]:
    """Probe and kNN mAP at the start and at the end; empty without labels."""
    if start.probe is None or end.probe is None or start.knn is None or end.knn is None:
        return {}
    probes = {"probe, start": start.probe.mAP, "probe, end": end.probe.mAP}
    return probes | {"kNN, start": start.knn, "kNN, end": end.knn}


def _classes(start: Snapshot, end: Snapshot) -> list[Plot]:
    if start.probe is None or end.probe is None:
        return []
    precisions = {START: start.probe.average_precision, END: end.probe.average_precision}
    order = end.probe.average_precision.nan_to_num(-1).argsort(descending=True).tolist()
    order = [column for column in order if end.probe.average_precision[column].isfinite()]
    assert end.features.labels is not None
    positives = (end.features.labels == 1).sum(0).tolist()
    counts = ClassCounts(end.images.classes, [0] * len(positives), positives)
    table = {
        "class": [end.images.classes[column] for column in order],
        "images": [str(positives[column]) for column in order],
        "start": [f"{start.probe.average_precision[column].item():.3f}" for column in order],
        "end": [f"{end.probe.average_precision[column].item():.3f}" for column in order],
    }
    rare = sum(positives[column] < FEW_POSITIVES for column in order)
    caption = (
        "Average precision per class of the linear probe; bars: end of the run, ticks: its start. After each class: "
        f"its val images; {rare} of {len(order)} classes have fewer than {FEW_POSITIVES} (*) and are unreliable."
    )
    if len(order) > figures.MAX_BARS:
        half = figures.MAX_BARS // 2
        caption += f" The best and the worst {half} are plotted; all {len(order)} are listed under Numbers."
    figure = figures.figure_of_classes(precisions, [counts.label(column) for column in range(len(positives))])
    return [plot_of("classes", "Each class", caption, figure, table)]


def _geometry(start: Snapshot, end: Snapshot, num_images: int) -> list[Plot]:
    cosines = figures.figure_of_cosines({"start": start.cosines, "end": end.cosines})
    means = ", ".join(
        f"{figures.KINDS[kind]} {values.mean().item():.2f} (start {start.cosines[kind].mean().item():.2f})"
        for kind, values in end.cosines.items()
    )
    spectra = figures.figure_of_spectra({"start": start.spectrum, "end": end.spectrum})
    directions = [directions_of_variance(one.spectrum) for one in (start, end)]
    return [
        plot_of(
            "cosines",
            "How similar are views?",
            f"Cosines of the projections of views of training images. Means at the end: {means}. The three should be "
            "in this order, with other images clearly separated.",
            cosines,
        ),
        plot_of(
            "spectrum",
            "Directions that the features use",
            f"Singular values of the centred features of {num_images:,} images. 90 % of the variance is in "
            f"{directions[1]} of {len(end.spectrum)} directions (start {directions[0]}).",
            spectra,
        ),
    ]


def _feature_map(end: Snapshot, shown: Records) -> FeatureMap:
    indices = spread_indices(len(shown), MAX_POINTS)
    positions, shares = map_2d(end.features.features[torch.from_numpy(indices)])
    order = np.zeros(0, int)
    groups = [-1] * len(indices)
    if shown.labels is not None:
        present = shown.labels[indices] == 1
        order = np.argsort(-present.sum(0), kind="stable")
        order = order[present.sum(0)[order] > 0]
        # An image's rarest frequent label is its most informative one.
        groups = [next((g for g in range(min(8, len(order)) - 1, -1, -1) if row[order[g]]), -1) for row in present]
    names = [shown.classes[column] for column in order]
    maps = [figures.svg(figures.figure_of_map(positions, shares, groups, names[:8]), "map")]
    better = neighbor_map(end.features.features[torch.from_numpy(indices)])
    if better is not None:
        maps.append(figures.svg(figures.figure_of_map(better[0], None, groups, names[:8]), "map-neighbors"))
    points = [
        {
            "name": shown.path(index).name,
            "labels": label_names(shown, index)[:MAX_LABELS],
            "classes": [] if shown.labels is None else np.flatnonzero(shown.labels[index][order] == 1).tolist(),
        }
        for index in indices.tolist()
    ]
    caption = (
        f"{len(indices):,} images on the two directions along which their features vary most (PCA of unit vectors). "
        "Hover over a point to see its image."
    )
    if better is not None:
        caption += (
            f" Below, t-SNE of the same vectors, which preserves neighbours better (trustworthiness {better[1]:.2f}, "
            f"PCA {better[2]:.2f}); distances between its groups are not meaningful."
        )
    if names:
        caption += " Colour: the image's rarest label among the eight most frequent."
    images = [picture(shown, index) for index in indices.tolist()]
    return FeatureMap(maps, caption, sprite(images), SPRITE_COLUMNS, THUMBNAIL, points, names)


def _neighbors(end: Snapshot, shown: Records) -> list[list[Neighbor]]:
    if len(shown) < 2:
        return []
    queries, found = nearest_of_some(end.features, NUM_QUERIES, NUM_NEAREST)
    return [
        [
            _neighbor(shown, query, query, None),
            *(
                _neighbor(shown, index, query, cosine)
                for index, cosine in zip(near.tolist(), similar.tolist(), strict=True)
            ),
        ]
        for query, near, similar in zip(queries.tolist(), found.indices, found.similarities, strict=True)
    ]


def _neighbor(shown: Records, index: int, query: int, cosine: float | None) -> Neighbor:
    shared = set(label_names(shown, query)) if index != query else set()
    labels = [(name, name in shared) for name in label_names(shown, index)[:MAX_LABELS]]
    return Neighbor(data_address(picture(shown, index), 132), shown.path(index).name, labels, cosine)


def _view_grids(folder: Path) -> list[tuple[str, str]]:
    grids = []
    for path in sorted((folder / "views").glob("*.png"))[:NUM_VIEW_GRIDS]:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        words = f"A training image ({path.stem}) with its blocks, next to the views of each block"
        grids.append((data_address(pixels, 1400, 82), words))
    return grids


def _notes(measurements: Measurements) -> list[str]:
    start, end = measurements.start, measurements.end
    if start.probe is None or end.probe is None:
        return [
            "There is no probe, because the training or the val set has no labels. The neighbours below show the "
            "quality of the features."
        ]
    strengths = f"{start.probe.strength:.2g} at the start, {end.probe.strength:.2g} at the end"
    return [
        f"The probe was trained on {len(measurements.train):,} of {len(measurements.all_train):,} training images "
        f"and scored on {len(end.images):,} val images, over the {end.probe.num_classes} classes present in them; "
        f"its regularisation was chosen on a fifth of the training images ({strengths})."
    ]


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
