"""Frozen features of a training and a test set, the input of every evaluation of a backbone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlssl.choices import Pooling
from mlssl.contracts import FeatureNetwork
from mlssl.evaluation.features import Features, extract_features

_MAX_LENGTH = 24
"""Maximum length of a backbone's name in a progress bar."""
POOLING: Pooling = "avgmax"
"""The mean of average and maximum pooling, as in published linear evaluations."""

EVAL_SIZE = 224
"""Side of whole images in pixels, unless a run sets another."""


class FrozenSets(NamedTuple):
    """Features of both sets of an evaluation."""

    train: Features
    test: Features


def frozen_sets(
    model: FeatureNetwork,
    train: Iterable[Mapping[str, Tensor]],
    test: Iterable[Mapping[str, Tensor]],
    *,
    pooling: Pooling = POOLING,
    cache: str | Path | None = None,
    name: str = "backbone",
    progress: bool = True,
) -> FrozenSets:
    """Extract the features of two sets; the model is moved to a GPU if there is one.

    Args:
        model: As for `extract_features`.
        train: Loader of whole images or of fixed crops.
        test: Likewise.
        pooling: As for `extract_features`.
        cache: Folder in which each set of each backbone gets a subfolder.
        name: Name of the backbone in the bars and subfolders; characters not allowed in a folder name are replaced.
        progress: Whether to show bars.

    Raises:
        ValueError: As `extract_features`.
    """
    if torch.cuda.is_available() and isinstance(model, nn.Module):
        model.to("cuda")
    stem = re.sub(r"[^A-Za-z0-9.=-]+", "_", name)
    folders = {split: None if cache is None else Path(cache) / f"{stem}-{split}" for split in ("train", "test")}
    short = name if len(name) <= _MAX_LENGTH else f"…{name[-_MAX_LENGTH + 1 :]}"
    bars = {split: f"{short}, {split}" if progress else False for split in folders}
    return FrozenSets(
        extract_features(model, train, pooling=pooling, cache=folders["train"], progress=bars["train"]),
        extract_features(model, test, pooling=pooling, cache=folders["test"], progress=bars["test"]),
    )
