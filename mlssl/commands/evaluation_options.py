"""Options that `mlssl linear` and `mlssl knn` share."""

from __future__ import annotations

from dataclasses import dataclass

from mlssl.choices import Pooling
from mlssl.data.set_options import SplitOptions


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(SplitOptions):
    """Images to extract features from, and how.

    None means that an option was not given, so that a protocol, which fixes some, can refuse those that were.

    Args:
        eval_size: Side, or height and width, of images; by default that of the first run, else 224.
        pooling: avg, max, or avgmax (default), their mean.
        batch_size: Images per step; 64 by default.
        num_workers: Loader processes.
        cache: Folder to cache features in.
        runs: Folder for the results folder.
        seed: For untrained weights, subsets, held-out images and the bootstrap.
    """

    eval_size: int | tuple[int, int] | None = None
    pooling: Pooling | None = None
    batch_size: int | None = None
    num_workers: int | None = None
    cache: str | None = None
    runs: str = "runs"
    seed: int = 0
