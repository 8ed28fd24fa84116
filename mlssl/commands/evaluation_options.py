"""Options that `mlssl linear` and `mlssl knn` share."""

from __future__ import annotations

from dataclasses import dataclass

from mlssl.choices import DatasetName, Pooling


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Which images features are taken of, and how.

    None means that an option was not given, so that a protocol, which fixes some, can refuse those that were.

    Args:
        dataset: Format of ROOT: synthetic (default), coco, voc, corel5k, manifest, folder or shards.
        root: Folder that holds the images.
        eval_size: Side, or height and width, of images; by default that of the first run, else 224.
        min_images_per_class: Leave out classes with fewer train and val images.
        train_split: Split to learn from; the format's own by default.
        val_split: Split to test on; the format's own by default.
        pooling: avg, max, or avgmax (default), their mean.
        batch_size: Images per step; 64 by default.
        num_workers: Loader processes.
        cache: Folder that keeps features, for a stopped or a second pass.
        runs: Folder of the results' folder.
        seed: Of untrained weights, subsets, held-out images and the bootstrap.
    """

    dataset: DatasetName | None = None
    root: str | None = None
    eval_size: int | tuple[int, int] | None = None
    min_images_per_class: tuple[int, int] | None = None
    train_split: str | None = None
    val_split: str | None = None
    pooling: Pooling | None = None
    batch_size: int | None = None
    num_workers: int | None = None
    cache: str | None = None
    runs: str = "runs"
    seed: int = 0
