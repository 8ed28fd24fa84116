"""Words that arguments accept, for the library and for the help of its commands: this file imports nothing heavy."""

from __future__ import annotations

from typing import Literal, TypeAlias

DatasetName = Literal["synthetic", "coco", "roboflow", "voc", "corel5k", "manifest", "folder", "shards"]
"""Formats that `mlssl.data.formats` reads."""

Pooling = Literal["avg", "max", "avgmax"]
"""Over the last feature map: average, maximum, or the mean of both."""

PositiveWeight: TypeAlias = float | Literal["balanced"]
"""Weight > 0 of a positive, where a negative has 1; "balanced": positives weigh as much as all negatives of a label."""
