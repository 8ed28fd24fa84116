"""What evaluation and callbacks ask of the objects that they are given, as Protocols: no base class is needed."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class FeatureNetwork(Protocol):
    """An object with a network and its normalisation, such as `MultiLabelSSLModule` or an opened backbone."""

    backbone: nn.Module
    """From normalised images (n, C, H, W) to features (n, D)."""

    def normalize(self, images: Tensor) -> Tensor:
        """Images uint8 (n, C, H, W) to what the backbone takes."""
        ...
