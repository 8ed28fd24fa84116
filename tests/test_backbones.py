"""Backbones: built by name or given, published weights, width, pixel statistics and pooling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models

from mlssl.backbones import (
    build_backbone,
    built_as,
    feature_width,
    image_shape,
    pixel_statistics,
    rebuild_backbone,
)
from mlssl.feature_maps import pooled_features

TINY_SWIN = {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 1)}


class GivesMaps(nn.Sequential):
    """A network without pooling: (n, 3, H, W) → (n, 5, H, W)."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 5, 1))


def images(side: int = 64, channels: int = 3, height: int | None = None) -> Tensor:
    return torch.rand(2, channels, height or side, side, generator=torch.Generator().manual_seed(0))


def shaken(network: nn.Module) -> nn.Module:
    """The network in eval mode with no weight left at 0 or 1, so that every part of it shows in its features."""
    rng = torch.Generator().manual_seed(0)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.add_(0.1 * torch.rand(value.shape, generator=rng))
    return network.eval()


# ---------------------------------------------------------------------- by name


@pytest.mark.parametrize(
    ("name", "kwargs", "width"),
    [
        ("test_resnet", {}, 96),
        ("resnet18", {}, 512),
        ("test_convnext.r160_in1k", {}, 64),
        ("test_vit", {}, 64),
        ("swin_tiny_patch4_window7_224", TINY_SWIN, 24),
        ("torchvision/resnet18", {}, 512),
        ("torchvision/shufflenet_v2_x0_5", {}, 1024),
        ("torchvision/mobilenet_v3_small", {}, 1024),
    ],
)
def test_any_name_gives_features_of_its_width(name: str, kwargs: dict[str, Any], width: int) -> None:
    network = build_backbone(name, **kwargs)
    assert feature_width(network) == width
    assert network.eval()(images()).shape == (2, width)


def test_a_module_is_returned_unchanged() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert build_backbone(network) is network
    assert feature_width(network) == 5
    assert built_as(network) is None


def test_arguments_with_a_module_are_refused() -> None:
    with pytest.raises(
        TypeError, match="The backbone is a GivesMaps already, so in_chans, pretrained cannot be passed"
    ):
        build_backbone(GivesMaps(), pretrained=True, in_chans=1)


def test_anything_but_a_name_or_a_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"backbone=18 was given: pass a timm name, 'torchvision/<name>' or an nn\.Mod"):
        build_backbone(18)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("resnet5O", "'resnet50'"),
        ("vit_smal_patch16_224", "'vit_small_patch16_224'"),
        ("torchvision/resnet_50", "'torchvision/resnet50'"),
        ("resnet-50", "'resnet50'"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name: str, suggestion: str) -> None:
    with pytest.raises(ValueError, match=f"Unknown backbone '{name}': did you mean .*{suggestion}.*timm.list_models"):
        build_backbone(name)


def test_a_name_unlike_any_other_gets_no_suggestion() -> None:
    with pytest.raises(ValueError, match=r"Unknown backbone 'ÄÖÜ': type a name from timm\.list_models\(\)"):
        build_backbone("ÄÖÜ")


@pytest.mark.parametrize("name", ["test_resnet", "torchvision/resnet18"])
def test_invalid_arguments_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="num_classes was given, but a backbone has no classifier"):
        build_backbone(name, num_classes=10)
    with pytest.raises(TypeError, match=f"Backbone '{name}' does not take 'colour': leave it out"):
        build_backbone(name, colour="red")


@pytest.mark.parametrize("name", ["test_resnet", "torchvision/resnet18"])
def test_type_errors_from_inside_a_library_are_not_hidden(name: str) -> None:
    with pytest.raises(TypeError, match="str"):
        build_backbone(name, in_chans="three")


def test_torchvision_networks_without_one_linear_classifier_are_refused() -> None:
    with pytest.raises(ValueError, match="'torchvision/squeezenet1_1' does not end in a linear classifier"):
        build_backbone("torchvision/squeezenet1_1")
    with pytest.raises(ValueError, match=r"'torchvision/googlenet' returns auxiliary scores .* pass aux_logits=False"):
        build_backbone("torchvision/googlenet", init_weights=False)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "torchvision/resnet18", "torchvision/resnet50"])
def test_residual_blocks_of_resnets_start_as_the_identity(name: str) -> None:
    blocks = [block for block in build_backbone(name).modules() if type(block).__name__ in ("BasicBlock", "Bottleneck")]
    assert len(blocks) == (8 if "18" in name else 16)
    for block in blocks:
        assert not (block.bn2 if type(block).__name__ == "BasicBlock" else block.bn3).weight.any()


# ---------------------------------------------------------------------- transformers


def test_transformers_take_any_image_size() -> None:
    network = build_backbone("test_vit").eval()
    assert network(images(64)).shape == network(images(96, height=128)).shape == (2, 64)


def test_transformers_average_their_patch_tokens() -> None:
    network = shaken(build_backbone("test_vit"))
    tokens = network.forward_features(images())
    assert network.num_prefix_tokens == 1
    assert tokens.shape == (2, 1 + 4 * 4, 64)
    torch.testing.assert_close(network(images()), network.fc_norm(tokens[:, 1:].mean(1)))


def test_given_arguments_of_a_transformer_take_precedence() -> None:
    network = shaken(build_backbone("test_vit", global_pool="token", dynamic_img_size=False))
    assert image_shape(network) == (3, 160, 160)
    torch.testing.assert_close(network(images(160)), network.forward_features(images(160))[:, 0])


# ---------------------------------------------------------------------- published weights


def saved(network: nn.Module, path: Path) -> str:
    torch.save(network.state_dict(), path)
    return str(path)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_pretrained_weights_of_timm_are_loaded(name: str, tmp_path: Path) -> None:
    published = shaken(timm.create_model(name))
    overlay = {"file": saved(published, tmp_path / "weights.pth")}
    network = build_backbone(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    expected = published.forward_head(published.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(network(images()), expected)


def test_a_pretrained_transformer_keeps_its_norm_before_the_average(tmp_path: Path) -> None:
    published = shaken(timm.create_model("test_vit"))
    overlay = {"file": saved(published, tmp_path / "weights.pth")}
    network = build_backbone("test_vit", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    tokens = published.forward_features(images(160))  # the norm is their last step
    torch.testing.assert_close(network(images(160)), tokens[:, 1:].mean(1))
    assert network(images(64)).shape == (2, 64)


@pytest.mark.parametrize(
    ("name", "kwargs"), [("swin_tiny_patch4_window7_224", TINY_SWIN), ("eva02_tiny_patch14_224", {"depth": 1})]
)
def test_pretrained_transformers_without_that_norm_take_any_image_size_too(
    name: str, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    overlay = {"file": saved(shaken(timm.create_model(name, **kwargs)), tmp_path / "weights.pth")}
    network = build_backbone(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
    assert network(images(112)).shape == (2, network.num_features)


def test_a_file_of_weights_is_loaded_by_checkpoint_path(tmp_path: Path) -> None:
    trained = shaken(build_backbone("test_resnet"))
    network = build_backbone("test_resnet", checkpoint_path=saved(trained, tmp_path / "trained.pth")).eval()
    torch.testing.assert_close(network(images()), trained(images()))


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_pretrained_weights_of_torchvision_are_loaded_for_any_number_of_channels(
    in_chans: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    published = shaken(models.shufflenet_v2_x0_5())
    saved(published, cache / Path(models.get_model_weights("shufflenet_v2_x0_5").DEFAULT.url).name)

    network = build_backbone("torchvision/shufflenet_v2_x0_5", pretrained=True, in_chans=in_chans).eval()
    published.fc = nn.Identity()
    gray = images(channels=1)  # equal channels: any first layer with the same sum of weights gives the same output
    torch.testing.assert_close(network(gray.expand(-1, in_chans, -1, -1)), published(gray.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "torchvision/shufflenet_v2_x0_5"])
def test_in_chans_is_passed_on(name: str) -> None:
    network = build_backbone(name, in_chans=5)
    assert image_shape(network) == (5, 64, 64)
    assert feature_width(network) > 0


def test_a_replaced_first_layer_keeps_bias_and_spread() -> None:
    for name in ("torchvision/resnet18", "torchvision/convnext_tiny"):
        first = next(layer for layer in build_backbone(name, in_chans=2).modules() if isinstance(layer, nn.Conv2d))
        usual = next(layer for layer in build_backbone(name).modules() if isinstance(layer, nn.Conv2d))
        assert first.weight.shape[1] == 2
        assert (first.bias is None) == (usual.bias is None)
        assert first.weight.std().item() == pytest.approx(usual.weight.std().item(), rel=0.1)


def test_an_image_has_at_least_one_channel() -> None:
    with pytest.raises(ValueError, match="in_chans=0 was given: an image has at least one channel"):
        build_backbone("torchvision/resnet18", in_chans=0)


def test_rebuilding_reads_no_weights(tmp_path: Path) -> None:
    overlay = {"file": saved(timm.create_model("test_vit"), tmp_path / "weights.pth"), "mean": (0.1, 0.2, 0.3)}
    kwargs = {"pretrained": True, "pretrained_cfg_overlay": overlay, "in_chans": 3}
    network = build_backbone("test_vit", **kwargs)
    (tmp_path / "weights.pth").unlink()
    again = rebuild_backbone("test_vit", **kwargs)
    assert built_as(again) == built_as(network)
    assert pixel_statistics(again) == pixel_statistics(network) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    again.load_state_dict(network.state_dict())


@pytest.mark.parametrize(
    ("name", "kwargs", "arguments"),
    [
        ("test_resnet", {"in_chans": 3}, {}),
        ("test_resnet", {"in_chans": 1}, {"in_chans": 1}),
        ("test_vit", {}, {"dynamic_img_size": True, "global_pool": "avg"}),
        ("torchvision/resnet18", {"width_per_group": 64}, {"width_per_group": 64}),
    ],
)
def test_a_network_remembers_what_it_was_built_as(name: str, kwargs: dict[str, Any], arguments: dict[str, Any]) -> None:
    assert built_as(build_backbone(name, **kwargs)) == (name, arguments)


# ---------------------------------------------------------------------- attributes of a network


def test_finding_the_width_does_not_change_the_network() -> None:
    network = build_backbone("test_resnet").train()
    network.bn1.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    flags = [module.training for module in network.modules()]
    feature_width(network)
    assert [module.training for module in network.modules()] == flags
    assert not all(flags)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


class Returns(nn.Module):
    """Returns a fixed output for any image."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, images: Tensor) -> object:
        return self.output


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (GivesMaps(), r"GivesMaps gives shape \(1, 5, 64, 64\) .* wrap it as nn.Sequential\(net, nn.AdaptiveAvgPool2d"),
        (Returns(torch.zeros(1, 7, 5)), r"gives shape \(1, 7, 5\) .* wrap it as a module that returns \(n, D\)"),
        (Returns(torch.zeros(2, 5)), r"gives shape \(2, 5\) for one image where \(1, D\) is needed"),
        (Returns([torch.zeros(1, 5)]), "gives a list for one image"),
        (nn.Linear(7, 5), r"Linear runs on none of the blank images \[\(3, 64, 64\), \(3, 224, 224\)\]"),
    ],
)
def test_networks_without_features_are_refused(network: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        feature_width(network)


@pytest.mark.parametrize(
    ("network", "mean", "std"),
    [
        (("test_vit", {}), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        (("resnet18", {}), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (("torchvision/shufflenet_v2_x0_5", {}), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (("resnet18", {"in_chans": 1}), (0.449,), (0.226,)),
        (("test_vit", {"in_chans": 4}), (0.5,) * 4, (0.5,) * 4),
    ],
)
def test_pixels_are_normalised_as_the_network_expects(
    network: tuple[str, dict[str, Any]], mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    found = pixel_statistics(build_backbone(network[0], **network[1]))
    assert found == (pytest.approx(mean), pytest.approx(std))


# ---------------------------------------------------------------------- poolings


@pytest.mark.parametrize("name", ["test_resnet", "torchvision/shufflenet_v2_x0_5", "test_convnext", "test_vit"])
def test_average_pooling_is_the_network_itself(name: str) -> None:
    network = shaken(build_backbone(name))
    torch.testing.assert_close(pooled_features(network, images()), network(images()))


@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18"])
def test_other_poolings_of_a_resnet_are_those_of_its_last_map(name: str) -> None:
    network = shaken(build_backbone(name))
    last_maps: list[Tensor] = []
    network.layer4.register_forward_hook(lambda _layer, _inputs, output: last_maps.append(output))
    largest, both = (pooled_features(network, images(), pooling) for pooling in ("max", "avgmax"))
    torch.testing.assert_close(largest, last_maps[0].amax((2, 3)))
    torch.testing.assert_close(both, (last_maps[0].amax((2, 3)) + last_maps[0].mean((2, 3))) / 2)


def test_layers_after_the_pooling_also_follow_other_poolings() -> None:
    convnext, vit = shaken(build_backbone("test_convnext")), shaken(build_backbone("test_vit"))
    largest = convnext.forward_features(images()).amax((2, 3))
    expected = convnext.head.norm(largest[:, :, None, None]).flatten(1)
    torch.testing.assert_close(pooled_features(convnext, images(), "max"), expected)
    patches = vit.forward_features(images())[:, 1:]
    torch.testing.assert_close(pooled_features(vit, images(), "max"), vit.fc_norm(patches.amax(1)))


def test_channels_last_maps_are_pooled_over_positions() -> None:
    network = shaken(build_backbone("swin_tiny_patch4_window7_224", **TINY_SWIN))
    maps = network.forward_features(images())
    assert maps.shape == (2, 8, 8, 24)
    torch.testing.assert_close(pooled_features(network, images(), "max"), maps.amax((1, 2)))


def test_a_compiled_network_is_pooled_like_the_plain_one() -> None:
    network = shaken(build_backbone("test_resnet"))
    expected = pooled_features(network, images(), "avgmax")
    torch.testing.assert_close(pooled_features(torch.compile(network), images(), "avgmax"), expected)


def test_an_unknown_pooling_is_refused() -> None:
    with pytest.raises(ValueError, match="pooling='median' is unknown: choose 'avg', 'max' or 'avgmax'"):
        pooled_features(build_backbone("test_resnet"), images(), "median")  # type: ignore[arg-type]


def test_an_inaccessible_last_map_is_reported() -> None:
    with pytest.raises(
        ValueError, match="pooling='max' needs the last feature map, which cannot be accessed in GivesM"
    ):
        pooled_features(GivesMaps(), images(), "max")
    by_token = build_backbone("test_vit", global_pool="token")
    with pytest.raises(ValueError, match=r"gives shape \(2, 17, 64\) with global_pool='token': use pooling='avg'"):
        pooled_features(by_token, images(), "max")
