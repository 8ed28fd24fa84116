"""What stands on the page about a run: from its log and two snapshots of its network to verdicts, facts and figures."""

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
from mlssl.report.measure import Snapshot, label_names, nearest_of_some, picture, spread_lines
from mlssl.report.page import SPRITE_COLUMNS, THUMBNAIL, FeatureMap, Neighbor, Page, Plot, data_address, sprite
from mlssl.report.verdicts import has_collapsed, is_learning, waits_for_data
from mlssl.run_folder import Log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POINTS = 600
"""Images on the map: their pictures take half a megabyte, and more points would hide one another."""

NUM_QUERIES = 12
NUM_NEAREST = 5
NUM_VIEW_GRIDS = 2
MAX_LABELS = 6  # of an image, which a caption can hold
START, END = "start of the run", "end of the run"


class Looked(NamedTuple):
    """What was seen of the network of a run, and on which images."""

    start: Snapshot
    """The network that the run began with."""
    end: Snapshot
    """The network that it ended with."""
    all_train: Records
    """Images of the run."""
    all_val: Records | None
    train: Records
    """Training images that were looked at."""


def build_page(
    folder: Path,
    config: dict[str, Any],
    log: dict[str, Log],
    looked: Looked | None,
    notes: Sequence[str] = (),
) -> Page:
    """Put the page together.

    Args:
        folder: Of the run; its pictures of views are shown.
        config: Settings of the run, as in its config.yaml.
        log: Quantity → its values over the run.
        looked: What was seen of the network; None shows the log alone.
        notes: Sentences on how the network was looked at.
    """
    settings: dict[str, Any] = {
        "title": folder.resolve().name,
        "facts": facts_of(folder, config, log) | (images_of(looked.all_train, looked.all_val) if looked else {}),
        "curves": _curves(log),
        "view_grids": _view_grids(folder),
        "version": version("mlssl"),
    }
    waits = waits_for_data(*(_median(log, name) for name in ("time/data", "time/step", "throughput/images_per_s")))
    dataset = config["data"].get("dataset") or config.get("data_class")
    if looked is None:
        return Page(subtitle=f"on {dataset}", verdicts=[waits], quality=_quality(log, {}), notes=notes, **settings)
    start, end = looked.start, looked.end
    steps = steps_taken(log)
    return Page(
        subtitle=f"{backbone_name(config)} on {len(looked.all_train):,} images of {dataset}",
        verdicts=[
            is_learning(_map_of(start), _map_of(end), _gap(start), _gap(end), steps),
            has_collapsed(end.spread, end.view_rank, end.num_views, steps),
            waits,
        ],
        quality=[*_quality(log, _levels(start, end)), *_classes(start, end)],
        geometry=_geometry(start, end, len(end.images)),
        neighbors=_neighbors(end, end.images),
        feature_map=_feature_map(end, end.images),
        notes=[*_notes(looked), *notes],
        **settings,
    )


def plot_of(name: str, title: str, caption: str, figure: Figure, table: dict[str, list[str]] | None = None) -> Plot:
    """A figure with what the pointer says of its points."""
    drawn = figures.svg(figure, name)
    return Plot(name, title, caption, drawn, table, figures.hover_points(figure))


LOSSES = {"train/loss": "total", "train/image_aware_loss": "image-aware", "train/pair_loss": "pair"}
"""Quantities of the log that have a panel each, and what stands beside it."""


def _curves(log: dict[str, Log]) -> list[Plot]:
    plots = []
    losses = {title: {title: _over_steps(log[name])} for name, title in LOSSES.items() if name in log}
    if losses:
        caption = "Total = pair term + contrastive_weight × image-aware term. The pair term cannot fall below −1."
        plots.append(plot_of("loss", "Loss", caption, figures.figure_of_panels(losses)))
    if "train/lr" in log:
        figure = figures.figure_of_curves({"learning rate": _over_steps(log["train/lr"])}, "learning rate")
        plots.append(plot_of("lr", "Learning rate", "As the steps were taken, scaled by the views of a step.", figure))
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
    words = "Lines with points: what the run logged about itself. "
    if levels:
        words = (
            "Dashed: a linear probe and the votes of the nearest training images, on frozen features, "
            f"start → end: probe {levels['probe, start']:.3f} → {levels['probe, end']:.3f}, "
            f"kNN {levels['kNN, start']:.3f} → {levels['kNN, end']:.3f}. "
        ) + (words if curves else "")
    return [plot_of("quality", "Probe and nearest neighbours", words, figure)]


def _levels(start: Snapshot, end: Snapshot) -> dict[str, float]:
    """What is known of the quality at the start and at the end; nothing without labels."""
    if start.probe is None or end.probe is None or start.knn is None or end.knn is None:
        return {}
    probes = {"probe, start": start.probe.mAP, "probe, end": end.probe.mAP}
    return probes | {"kNN, start": start.knn, "kNN, end": end.knn}


def _classes(start: Snapshot, end: Snapshot) -> list[Plot]:
    if start.probe is None or end.probe is None:
        return []
    precisions = {START: start.probe.average_precision, END: end.probe.average_precision}
    order = end.probe.average_precision.nan_to_num(-1).argsort(descending=True).tolist()
    order = [place for place in order if end.probe.average_precision[place].isfinite()]
    assert end.features.labels is not None
    positives = (end.features.labels == 1).sum(0).tolist()
    counts = ClassCounts(end.images.classes, [0] * len(positives), positives)
    table = {
        "class": [end.images.classes[place] for place in order],
        "images": [str(positives[place]) for place in order],
        "start": [f"{start.probe.average_precision[place].item():.3f}" for place in order],
        "end": [f"{end.probe.average_precision[place].item():.3f}" for place in order],
    }
    rare = sum(positives[place] < FEW_POSITIVES for place in order)
    caption = (
        "Average precision of each class by the linear probe; bars: the end of the run, strokes: its start. Behind a "
        f"class: val images that show it; {rare} of {len(order)} have fewer than {FEW_POSITIVES} (*), and say little."
    )
    if len(order) > figures.MAX_BARS:
        half = figures.MAX_BARS // 2
        caption += f" Drawn are the best and the worst {half}; all {len(order)} stand under Numbers."
    figure = figures.figure_of_classes(precisions, [counts.label(place) for place in range(len(positives))])
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
            "How alike are views?",
            f"Cosines of the projections of views of training images. Means at the end: {means}. The three should be "
            "ordered, and other images apart from the rest.",
            cosines,
        ),
        plot_of(
            "spectrum",
            "Directions that the features use",
            f"Singular values of the features of {num_images:,} images about their mean. 90 % of the variance lies in "
            f"{directions[1]} of {len(end.spectrum)} directions (start {directions[0]}).",
            spectra,
        ),
    ]


def _feature_map(end: Snapshot, shown: Records) -> FeatureMap:
    lines = spread_lines(len(shown), MAX_POINTS)
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
    maps = [figures.svg(figures.figure_of_map(places, shares, groups, names[:8]), "map")]
    better = neighbor_map(end.features.features[torch.from_numpy(lines)])
    if better is not None:
        maps.append(figures.svg(figures.figure_of_map(better[0], None, groups, names[:8]), "map-neighbors"))
    points = [
        {
            "name": shown.path(line).name,
            "labels": label_names(shown, line)[:MAX_LABELS],
            "classes": [] if shown.labels is None else np.flatnonzero(shown.labels[line][order] == 1).tolist(),
        }
        for line in lines.tolist()
    ]
    caption = (
        f"{len(lines):,} images on the two directions along which their features vary most (PCA of unit vectors). "
        "Point at one to see it."
    )
    if better is not None:
        caption += (
            f" Below, t-SNE of the same vectors, which keeps neighbours better (trustworthiness {better[1]:.2f}, PCA "
            f"{better[2]:.2f}); distances between its groups mean nothing."
        )
    if names:
        caption += " An image is coloured by the rarest of the eight most frequent labels that it shows."
    images = [picture(shown, line) for line in lines.tolist()]
    return FeatureMap(maps, caption, sprite(images), SPRITE_COLUMNS, THUMBNAIL, points, names)


def _neighbors(end: Snapshot, shown: Records) -> list[list[Neighbor]]:
    if len(shown) < 2:
        return []
    queries, found = nearest_of_some(end.features, NUM_QUERIES, NUM_NEAREST)
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
    shared = set(label_names(shown, query)) if line != query else set()
    labels = [(name, name in shared) for name in label_names(shown, line)[:MAX_LABELS]]
    return Neighbor(data_address(picture(shown, line), 132), shown.path(line).name, labels, cosine)


def _view_grids(folder: Path) -> list[tuple[str, str]]:
    grids = []
    for path in sorted((folder / "views").glob("*.png"))[:NUM_VIEW_GRIDS]:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        words = f"A training image ({path.stem}) with its blocks, and beside it the views of each block"
        grids.append((data_address(pixels, 1400, 82), words))
    return grids


def _notes(looked: Looked) -> list[str]:
    start, end = looked.start, looked.end
    if start.probe is None or end.probe is None:
        return [
            "Without labels in the training and the val set there is no probe. What the features are good for shows in "
            "the neighbours below."
        ]
    strengths = f"{start.probe.strength:.2g} at the start, {end.probe.strength:.2g} at the end"
    return [
        f"The probe learned from {len(looked.train):,} of {len(looked.all_train):,} training images and was scored on "
        f"{len(end.images):,} val images, in {end.probe.num_classes} classes that these show; "
        f"how strongly it is regularised was chosen on a fifth of the training images ({strengths})."
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
