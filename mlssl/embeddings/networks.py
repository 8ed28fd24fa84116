"""Network from images to rows, for streaming."""

from __future__ import annotations

from torch import Tensor, nn

from mlssl.choices import Pooling
from mlssl.contracts import FeatureNetwork
from mlssl.feature_maps import feature_map, pooled_features


class FeatureRows(nn.Module):
    """Images uint8 (n, C, H, W) to features (n, D), or to feature maps (n, D, h, w).

    Args:
        model: Model with backbone and normalisation.
        pooling: Pooling of the last feature map.
        patches: Whether to return the map instead.
    """

    def __init__(self, model: FeatureNetwork, pooling: Pooling = "avg", *, patches: bool = False) -> None:
        super().__init__()
        self.model, self.pooling, self.patches = model, pooling, patches

    def forward(self, images: Tensor) -> Tensor:
        """Rows of the images."""
        normalized = self.model.normalize(images)
        if self.patches:
            return feature_map(self.model.backbone, normalized)
        return pooled_features(self.model.backbone, normalized, self.pooling)
