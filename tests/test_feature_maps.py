"""The last feature map: its mean equals the features if only an average follows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mlssl.backbones import build_backbone
from mlssl.feature_maps import feature_map


@pytest.mark.parametrize("name", ["test_resnet", "torchvision/resnet18", "resnet10t"])
def test_the_mean_of_a_residual_networks_map_is_its_features(name: str) -> None:
    network = build_backbone(name).eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        places, features = feature_map(network, images), network(images)
    assert places.shape == (2, features.shape[1], 2, 3)
    torch.testing.assert_close(places.mean((2, 3)), features)


@pytest.mark.parametrize(("name", "patch"), [("test_vit", 16), ("test_convnext", 32)])
def test_layers_after_the_pooling_are_applied_at_each_position(name: str, patch: int) -> None:
    network = build_backbone(name).eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        places, features = feature_map(network, images), network(images)
    assert places.shape == (2, features.shape[1], 64 // patch, 96 // patch)
    torch.testing.assert_close(places.mean(1), torch.zeros_like(places[:, 0]), atol=1e-4, rtol=0)  # of a fresh norm


def test_a_patch_has_its_position_in_the_image() -> None:
    network = build_backbone("test_resnet").eval()
    blank, marked = torch.zeros(1, 3, 320, 320), torch.zeros(1, 3, 320, 320)
    marked[:, :, :40, 280:] = 5.0
    with torch.no_grad():
        change = (feature_map(network, marked) - feature_map(network, blank)).abs().sum(1)[0]
    assert divmod(int(change.argmax()), change.shape[1]) == (0, change.shape[1] - 1)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            "map of Sequential cannot be accessed: pass a timm backbone",
        ),
        (
            build_backbone("test_vit", global_pool="token"),
            "cannot be accessed, it gives shape .* with global_pool='token'",
        ),
        (build_backbone("torchvision/mobilenet_v3_small"), "has 576 channels and its features 1024"),
    ],
)
def test_an_inaccessible_map_is_reported(network: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        feature_map(network.eval(), torch.zeros(1, 3, 160, 160))


def test_patches_on_no_known_grid_are_refused() -> None:
    network = build_backbone("test_vit").eval()
    network.patch_embed.patch_size = (10, 10)
    with pytest.raises(ValueError, match="The 100 patches of VisionTransformer do not form a known grid"):
        feature_map(network, torch.zeros(1, 3, 160, 160))
