"""What can be said about a network by looking at some images: how its views, features and neighbours lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mlssl.backbones import image_shape
from mlssl.choices import Pooling
from mlssl.contracts import FeatureNetwork
from mlssl.data.bad_images import BadImages
from mlssl.data.datasets import ImageDataset, collated
from mlssl.data.decoding import BadImageError, ImageArray
from mlssl.data.loader import PartialLoader
from mlssl.data.records import Records
from mlssl.evaluation.features import Features, extract_features
from mlssl.evaluation.geometry import effective_rank, feature_spectrum, pair_cosines, spread
from mlssl.evaluation.metrics import mean_average_precision
from mlssl.evaluation.neighbors import NUM_NEIGHBORS, Neighbors, knn_scores, nearest_neighbors
from mlssl.evaluation.probe import LinearProbeResult, linear_probe
from mlssl.feature_maps import pooled_features
from mlssl.modes import eval_mode, training_mode
from mlssl.views.blocks import BlockViews

MAX_VIEWS = 1024
"""Views whose cosines are taken: a million pairs, which a histogram shows without steps."""


class ProjectingNetwork(FeatureNetwork, Protocol):
    """A network whose views are compared behind a projector."""

    projector: nn.Module
    """From features (n, D) to projections (n, P)."""


@dataclass(frozen=True)
class Snapshot:
    """A network at one moment, seen through the same images as at any other.

    Attributes:
        features: Of whole images: the val images, or training images where there are no val images.
        images: Those that the features are of, line by line.
        spectrum: Singular values of these features about their mean.
        rank: Their effective number of directions.
        cosines: Of pairs of views by kind, see `mlssl.evaluation.geometry.pair_cosines`.
        num_views: Views of these.
        spread: Of the projections of these views, 0 to 1.
        view_rank: Effective number of directions of these projections.
        probe: Linear probe from training to val images; None without labels in both.
        knn: mAP of the k nearest training images' votes, 0–1; None likewise.
    """

    features: Features
    images: Records
    spectrum: Tensor
    rank: float
    cosines: dict[str, Tensor]
    num_views: int
    spread: float
    view_rank: float
    probe: LinearProbeResult | None
    knn: float | None


def some_images(records: Records, most: int) -> Records:
    """At most so many images, evenly spread over the records."""
    return records if len(records) <= most else records.subset(spread_lines(len(records), most))


def spread_lines(number: int, most: int) -> npt.NDArray[np.int64]:
    """At most so many of the lines 0 … number − 1, evenly spread and ascending."""
    return np.unique(np.linspace(0, number - 1, min(most, number)).round().astype(np.int64))


def nearest_of_some(features: Features, num_queries: int, k: int) -> tuple[npt.NDArray[np.int64], Neighbors]:
    """Lines of some images, evenly spread, and the k nearest of each among all others; fewer where there are fewer.

    Args:
        features: Of at least two images.
        num_queries: Images at most.
        k: Neighbours at most.
    """
    queries = spread_lines(len(features.features), num_queries)
    lines, ids = torch.from_numpy(queries), features.image_ids
    near = min(k, len(features.features) - 1)
    return queries, nearest_neighbors(
        features.features[lines], features.features, near, query_ids=ids[lines], bank_ids=ids
    )


def picture(records: Records, line: int) -> ImageArray:
    """An image as red, green and blue, uint8 (H, W, 3): its first three channels, or its first as gray."""
    pixels = records.image(line)
    return pixels[:, :, :3] if pixels.shape[2] >= 3 else pixels[:, :, [0, 0, 0]]


def label_names(records: Records, line: int) -> list[str]:
    """Classes that an image is known to show."""
    if records.labels is None:
        return []
    return [records.classes[column] for column in np.flatnonzero(records.labels[line] == 1)]


def features_of(
    model: FeatureNetwork,
    records: Records,
    eval_size: tuple[int, int],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    pooling: Pooling = "avg",
    progress: str = "",
) -> Features:
    """Features of whole images; one that cannot be decoded is left out, as in a run that skips it.

    `progress` is the name of a bar; empty for none.
    """
    loader = PartialLoader(
        ImageDataset(records, eval_size, BadImages(len(records))),
        batch_size,
        num_workers=num_workers,
        collate_fn=collated,
        generator=torch.Generator(),
    )
    return extract_features(model, loader, pooling=pooling, progress=progress or False)


def usable_pooling(backbone: nn.Module, pooling: Pooling) -> Pooling:
    """The pooling, or the average where the last feature map of the backbone cannot be reached."""
    image = torch.zeros(1, *image_shape(backbone), device=next(backbone.parameters()).device)
    try:
        with eval_mode(backbone):
            pooled_features(backbone, image, pooling)
    except ValueError:
        return "avg"
    return pooling


def measure(
    model: ProjectingNetwork,
    train: Records,
    val: Records | None,
    views: BlockViews,
    eval_size: tuple[int, int],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    progress: str = "",
    pooling: Pooling = "avg",
) -> Snapshot:
    """Look at a network. Weights, buffers, training flags and the global random state are as before afterwards.

    Args:
        model: `MultiLabelSSLModule`, or any module with `backbone`, `normalize` and `projector`.
        train: Images of the probe's training set, and those that views are made of.
        val: Images that features are shown of and the probe is scored on; None takes `train` for the former.
        views: How views are made, as in the run.
        eval_size: Height and width that whole images are resized to.
        batch_size: Images at a time.
        num_workers: Loader processes.
        seed: Of the views and of the probe's split.
        progress: Name of the network in bars with images per second; empty for none.
        pooling: Of the features of whole images.

    Raises:
        ValueError: As `extract_features` and `linear_probe`.
    """

    def seen(records: Records, split: str) -> Features:
        return features_of(
            model,
            records,
            eval_size,
            batch_size=batch_size,
            num_workers=num_workers,
            pooling=pooling,
            progress=f"{progress}, {split}" if progress else "",
        )

    candidates = train if val is None else val
    shown = seen(candidates, "train" if val is None else "val")
    if len(shown.image_ids) < len(candidates):
        candidates = candidates.subset(np.isin(candidates.image_ids, shown.image_ids.numpy()))
    probe, knn = None, None
    if val is not None and shown.labels is not None and train.labels is not None and bool((shown.labels == 1).any()):
        bank = seen(train, "train")
        assert bank.labels is not None
        probe = linear_probe(bank, shown, num_resamples=0, seed=seed)
        k = min(NUM_NEIGHBORS, len(bank.features))
        scores = knn_scores(shown.features, bank.features, bank.labels, k)
        knn, _ = mean_average_precision(scores, shown.labels)
    projections = view_projections(model, train, views, batch_size, seed)
    rows = nn.functional.normalize(projections.flatten(0, 2), dim=1)
    spectrum = feature_spectrum(shown.features)
    return Snapshot(
        features=shown,
        images=candidates,
        spectrum=spectrum,
        rank=effective_rank(spectrum).item(),
        cosines=pair_cosines(projections),
        num_views=len(rows),
        spread=spread(rows).item(),
        view_rank=effective_rank(torch.linalg.svdvals(rows)).item(),
        probe=probe,
        knn=knn,
    )


def view_projections(
    model: ProjectingNetwork, records: Records, views: BlockViews, batch_size: int, seed: int = 0
) -> Tensor:
    """Projections (B, A, K, P) of views of some images as a training step sees them: by the batch's own statistics.

    The images go through in batches of the run's size, about 1024 views in all. The network is left as it was.

    Args:
        model: `MultiLabelSSLModule`, or any module with `backbone`, `normalize` and `projector`.
        records: Images, evenly chosen from.
        views: How views are made.
        batch_size: Images of a step of the run.
        seed: Of the views.
    """
    of_an_image = views.num_blocks * views.num_branches
    chosen = some_images(records, max(2, MAX_VIEWS // of_an_image))
    size = max(2, min(batch_size, len(chosen)))
    device = next(model.backbone.parameters()).device
    batches = []
    with training_mode(model.backbone), training_mode(model.projector):
        for first in range(0, len(chosen) - size + 1, size):
            lines = range(first, first + size)
            made = torch.stack([views(image, np.random.default_rng([seed, i])) for i, image in _decoded(chosen, lines)])
            branches = [
                model.projector(model.backbone(model.normalize(made[:, branch].flatten(0, 1).to(device)))).float()
                for branch in range(views.num_branches)
            ]
            batches.append(torch.stack([z.view(len(made), views.num_blocks, -1) for z in branches], dim=1).cpu())
    return torch.cat(batches)


def _decoded(records: Records, lines: Iterable[int]) -> Iterator[tuple[int, ImageArray]]:
    """Images that can be decoded, and their lines."""
    for line in lines:
        with suppress(BadImageError):
            yield line, records.image(line)
