"""Positives per class of an evaluation: the average precision of a rare class is unreliable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mlssl.data.records import Records

FEW_POSITIVES = 10
"""With fewer positives in the test images, the average precision of a class is unreliable."""


class ClassCounts(NamedTuple):
    """Number of positives of each class in the training and the test images, all of length L."""

    classes: Sequence[str]
    train: Sequence[int]
    test: Sequence[int]

    def label(self, index: int) -> str:
        """Name, and number of positives in the test images; a star marks a rare class."""
        return f"{self.classes[index]} {self.test[index]}{'*' if self.test[index] < FEW_POSITIVES else ''}"


def class_counts(train: Records, test: Records) -> ClassCounts:
    """Count the positives of each class in two labelled sets."""
    assert train.labels is not None
    assert test.labels is not None
    return ClassCounts(train.classes, (train.labels == 1).sum(0).tolist(), (test.labels == 1).sum(0).tolist())


def frequent_mean(average_precision: Tensor, positives: Tensor) -> float:
    """Mean over the classes that are not rare; NaN if all are rare.

    >>> import torch
    >>> frequent_mean(torch.tensor([0.5, 1.0, 0.7]), torch.tensor([10, 9, 30]))
    0.6000000238418579
    """
    return average_precision[positives >= FEW_POSITIVES].nanmean().item()
