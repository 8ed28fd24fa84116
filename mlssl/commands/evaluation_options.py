"""Options that `mlssl linear` and `mlssl knn` share."""

from __future__ import annotations

from dataclasses import dataclass

from mlssl.choices import DatasetName, Pooling


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Which images features are taken of, and how.

    None means that an option was not given, so that a protocol, which fixes some, can refuse those that were.

    Args:
        dataset: Format of the images; synthetic by default.
        root: Folder that holds the images.
        eval_size: Height and width, or one side, that whole images are resized to; 224 by default.
        min_images_per_class: Keep only classes with at least so many train and so many val images.
        train_split: Split to learn from; the format's training split by default.
        val_split: Split to test on; the format's val or test split by default.
        pooling: Over the last feature map, or the mean of both; avgmax by default.
        batch_size: Images per step; 64 by default.
        num_workers: Loader processes.
        cache: Folder to keep features in: a pass that was stopped goes on, one that is done is not repeated.
        runs: Folder in which the results get one of their own.
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
