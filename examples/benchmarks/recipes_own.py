"""Own ingredients that are on trial: terms over sets of blocks, which no setting of the library has."""

from collections.abc import Sequence
from itertools import combinations, permutations
from typing import NamedTuple

import torch
from torch import Tensor

from mlssl import MultiLabelSSLModule
from mlssl.data.batches import ViewBatch
from mlssl.losses import negative_cosine_similarity

BLOCKS = 4
"""Blocks per image of the trials' grid."""


class Sets(NamedTuple):
    """Outputs of N views, and of the sets of blocks of their N/4 images: pairs (6·N/4, P), whole images (N/4, P)."""

    features: Tensor
    projections: Tensor
    predictions: Tensor
    pair_projections: Tensor
    pair_predictions: Tensor
    whole_projections: Tensor


class SetsOfBlocks(MultiLabelSSLModule):
    """Single blocks and pairs of blocks are anchors; the pair term's target is the mean of the other branch's blocks.

    The features of a set are the mean of its blocks' features, before the projector, as in Fast-MoCo (the split and
    combination of arXiv 2203.07424). The target has no gradient, as in FastSiam.
    """

    def embed(self, views: Tensor) -> Sets:  # type: ignore[override]
        features = self.backbone(self.normalize(views))
        of_images = features.unflatten(0, (-1, BLOCKS))
        pairs = torch.stack([of_images[:, list(pair)].mean(dim=1) for pair in combinations(range(BLOCKS), 2)], dim=1)
        rows = [features, pairs.flatten(0, 1), of_images.mean(dim=1)]
        lengths = [len(one) for one in rows]
        projections = self.projector(torch.cat(rows)).split(lengths)
        predictions = self.predictor(torch.cat(projections[:2])).split(lengths[:2])
        return Sets(features, projections[0], predictions[0], projections[1], predictions[1], projections[2])

    def terms(self, embeddings: Sequence[Sets], batch: ViewBatch) -> dict[str, tuple[float, Tensor]]:  # type: ignore[override]
        pair, image_aware = [], []
        for a, b in permutations(range(len(embeddings)), 2):
            target = embeddings[b].whole_projections.detach()
            for predictions, projections in (
                (embeddings[a].predictions, embeddings[b].projections),
                (embeddings[a].pair_predictions, embeddings[b].pair_projections),
            ):
                per_image = len(predictions) // len(target)
                ids = batch["image_ids"].repeat_interleave(per_image)
                pair.append(negative_cosine_similarity(predictions, target.repeat_interleave(per_image, dim=0)))
                image_aware.append(self.image_aware(torch.cat([predictions, projections]), ids.repeat(2)))
        return {
            "pair": (1.0, torch.stack(pair).mean()),
            "image_aware": (self.contrastive_weight, torch.stack(image_aware).mean()),
        }
