"""What a trial is judged by: a linear probe and nearest neighbours, cross-validated inside the training images."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mlssl import MultiLabelDataModule
from mlssl.evaluation.features import Features, extract_features
from mlssl.evaluation.metrics import mean_average_precision
from mlssl.evaluation.neighbors import NUM_NEIGHBORS, knn_scores
from mlssl.evaluation.probe import linear_probe

FOLDS = 5
SEED_OF_FOLDS = 0
POOLINGS = ("average", "average_max")


class BothPoolings(nn.Module):
    """A ResNet's features under average pooling, next to those under (average + maximum) / 2, in one pass."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (n, 3, H, W) to (n, 2D)."""
        maps = self.backbone.forward_features(images)
        average = maps.mean((2, 3))
        return torch.cat([average, (average + maps.amax((2, 3))) / 2], dim=1)


class Pooled(nn.Module):
    """What `extract_features` takes."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.backbone, self.normalize = BothPoolings(network.backbone), network.normalize


def folds(count: int) -> list[Tensor]:
    """The same parts of as many images for every trial."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SEED_OF_FOLDS))
    return [part.sort().values for part in order.chunk(FOLDS)]


def cross_validated(network: nn.Module, data: MultiLabelDataModule) -> dict[str, float]:
    """Mean mAP over the folds, each probed by a classifier of the others, λ chosen inside them; test images unseen."""
    both = extract_features(Pooled(network), data.image_dataloader("train"))
    parts = folds(len(both.features))
    rows = [(torch.cat(parts[:k] + parts[k + 1 :]), parts[k]) for k in range(FOLDS)]
    return _scores("cv", [(_rows(both, train), _rows(both, held)) for train, held in rows])


def tested(network: nn.Module, data: MultiLabelDataModule) -> dict[str, float]:
    """The same on the test images, with a classifier of all training images."""
    train, test = (extract_features(Pooled(network), data.image_dataloader(split)) for split in ("train", "val"))
    return _scores("test", [(train, test)])


def _scores(kind: str, pairs: Iterable[tuple[Features, Features]]) -> dict[str, float]:
    found: dict[str, list[float]] = {f"{kind}_{name}": [] for name in (*POOLINGS, "knn")}
    for train, held in pairs:
        width = train.features.shape[1] // 2
        for name, columns in zip(POOLINGS, (slice(width), slice(width, None)), strict=True):
            learned, judged = (one._replace(features=one.features[:, columns].contiguous()) for one in (train, held))
            found[f"{kind}_{name}"].append(linear_probe(learned, judged, num_resamples=0).mAP)
            if name == "average":
                k = min(NUM_NEIGHBORS, len(learned.features))
                votes = knn_scores(judged.features, learned.features, learned.labels, k)
                found[f"{kind}_knn"].append(mean_average_precision(votes, judged.labels)[0])
    means = {name: round(sum(values) / len(values), 4) for name, values in found.items()}
    if any(map(math.isnan, means.values())):
        raise ValueError("a fold has no class that some of its images show and others do not: use a larger set")
    return means


def _rows(features: Features, rows: Tensor) -> Features:
    return Features(*(one[rows] for one in features))
