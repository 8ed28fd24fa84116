"""Measure a network on some images: cosines of views, spectrum of features, neighbours, probe and kNN."""

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
"""Views for the cosines: a million pairs, enough for a smooth histogram."""


class ProjectingNetwork(FeatureNetwork, Protocol):
    """A network whose views are compared by projections."""

    projector: nn.Module
    """Maps features (n, D) to projections (n, P)."""


@dataclass(frozen=True)
class Snapshot:
    """Measurements of a network at one moment of a run.

    Attributes:
        features: Features of the whole val images, or of training images if there are no val images.
        images: The images of these features, in the order of the rows.
        spectrum: Singular values of the centred features.
        rank: Effective rank of the features.
        cosines: Cosines of pairs of views by kind, see `mlssl.evaluation.geometry.pair_cosines`.
        num_views: Number of these views.
        spread: Spread of the projections of these views, 0 to 1.
        view_rank: Effective rank of these projections.
        probe: Linear probe trained on training images and scored on val images; None unless both have labels.
        knn: kNN mAP of the val images against the training images, 0–1; None unless both have labels.
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
    """At most `most` images, evenly spaced."""
    return records if len(records) <= most else records.subset(spread_indices(len(records), most))


def spread_indices(number: int, most: int) -> npt.NDArray[np.int64]:
    """At most `most` of the indices 0 … number − 1, evenly spaced and ascending."""
    return np.unique(np.linspace(0, number - 1, min(most, number)).round().astype(np.int64))


def nearest_of_some(features: Features, num_queries: int, k: int) -> tuple[npt.NDArray[np.int64], Neighbors]:
    """Indices of some evenly spaced images, and the k nearest others of each (fewer if there are fewer images).

    Args:
        features: Features of at least two images.
        num_queries: Maximum number of query images.
        k: Maximum number of neighbours.
    """
    queries = spread_indices(len(features.features), num_queries)
    indices, ids = torch.from_numpy(queries), features.image_ids
    near = min(k, len(features.features) - 1)
    return queries, nearest_neighbors(
        features.features[indices], features.features, near, query_ids=ids[indices], bank_ids=ids
    )


def picture(records: Records, index: int) -> ImageArray:
    """RGB pixels of an image, uint8 (H, W, 3): the first three channels, or the first one as gray."""
    pixels = records.image(index)
    return pixels[:, :, :3] if pixels.shape[2] >= 3 else pixels[:, :, [0, 0, 0]]


def label_names(records: Records, index: int) -> list[str]:
    """Names of an image's positive classes."""
    if records.labels is None:
        return []
    return [records.classes[column] for column in np.flatnonzero(records.labels[index] == 1)]


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
    """Features of whole images; images that cannot be decoded are skipped.

    `progress` is the label of a progress bar; empty for none.
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
    """`pooling`, or "avg" if the backbone's last feature map is not accessible."""
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
    """Measure a network. Weights, buffers, training flags and the global random state do not change.

    Args:
        model: `MultiLabelSSLModule`, or any module with `backbone`, `normalize` and `projector`.
        train: Training images of the probe, and source of the views.
        val: Images for the features and for scoring the probe; None takes the features of `train`.
        views: Augmentation of the run.
        eval_size: Height and width that whole images are resized to.
        batch_size: Images per batch.
        num_workers: Loader processes.
        seed: Seed of the views and of the probe's split.
        progress: Label of the progress bars; empty for none.
        pooling: Pooling of the features of whole images.

    Raises:
        ValueError: See `extract_features` and `linear_probe`.
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
    """Projections (B, A, K, P) of views of some images, with batch statistics as in a training step.

    Uses batches of the run's size, about 1024 views in total. The network does not change.

    Args:
        model: `MultiLabelSSLModule`, or any module with `backbone`, `normalize` and `projector`.
        records: Images; evenly spaced ones are used.
        views: Augmentation.
        batch_size: Images per step of the run.
        seed: Seed of the views.
    """
    of_an_image = views.num_blocks * views.num_branches
    chosen = some_images(records, max(2, MAX_VIEWS // of_an_image))
    size = max(2, min(batch_size, len(chosen)))
    device = next(model.backbone.parameters()).device
    batches = []
    with training_mode(model.backbone), training_mode(model.projector):
        for first in range(0, len(chosen) - size + 1, size):
            decoded = _decoded(chosen, range(first, first + size))
            made = torch.stack([views(image, np.random.default_rng([seed, i])) for i, image in decoded])
            branches = [
                model.projector(model.backbone(model.normalize(made[:, branch].flatten(0, 1).to(device)))).float()
                for branch in range(views.num_branches)
            ]
            batches.append(torch.stack([z.view(len(made), views.num_blocks, -1) for z in branches], dim=1).cpu())
    return torch.cat(batches)


def _decoded(records: Records, indices: Iterable[int]) -> Iterator[tuple[int, ImageArray]]:
    """Indices and pixels of the images that can be decoded."""
    for index in indices:
        with suppress(BadImageError):
            yield index, records.image(index)
