"""Accepted values of arguments, for the library and the help of its commands, without large imports."""

from __future__ import annotations

from typing import Literal, TypeAlias

DatasetName = Literal["synthetic", "coco", "roboflow", "voc", "corel5k", "manifest", "folder", "shards"]
"""Formats of `mlssl.data.formats`."""

Pooling = Literal["avg", "max", "avgmax"]
"""Pooling of the last feature map: average, maximum, or the mean of both."""

PositiveWeight: TypeAlias = float | Literal["balanced"]
"""Weight > 0 of a positive, relative to 1 of a negative; "balanced": equal totals for each label."""
