"""Backbones: any timm name, `torchvision/<name>`, or a module of one's own, all giving features (n, D)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

Pooling = Literal["avg", "max", "avgmax"]

TORCHVISION_PREFIX = "torchvision/"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# A vision transformer pre-trained here sees views of one size and whole images of another, and its
# class token is trained by nothing: any image size, and the mean over the patch tokens.
_TRANSFORMER_DEFAULTS = {"dynamic_img_size": True, "global_pool": "avg"}
# Published weights carry a norm in front of the pooling, which timm drops when it pools by average.
_PRETRAINED_TRANSFORMER_DEFAULTS = {**_TRANSFORMER_DEFAULTS, "fc_norm": False}
_WEIGHT_SOURCES = ("pretrained_cfg_overlay", "pretrained_cfg", "checkpoint_path", "cache_dir", "weights", "progress")
_TORCHVISION_HEADS = ("fc", "classifier", "heads", "head")
_DRY_RUN_SIDES = (64, 224)


def build_backbone(backbone: str | nn.Module, **kwargs: Any) -> nn.Module:
    """Builds a network that takes normalised images (n, C, H, W) and gives features (n, D).

    The last batch-norm scale of each residual block starts at 0 (METHOD.md §2) wherever timm or torchvision can.
    timm's vision transformers take any image size and average their patch tokens, unless `dynamic_img_size` or
    `global_pool` say otherwise.

    Args:
        backbone: a timm name (`"resnet50"`, `"vit_small_patch16_224"`), `"torchvision/<name>"`, or a module, which
            is returned as it is.
        **kwargs: passed on to the constructor. `pretrained=True` loads the published weights of either library, and
            `in_chans=C` (default 3) sets the number of image channels.

    Raises:
        ValueError: an unknown name, a torchvision network without a classifier to take off, or `num_classes`.
        TypeError: an argument that the network does not take, or any argument together with a module.
    """
    return _build(backbone, kwargs, load_weights=True)


def rebuild_backbone(backbone: str, **kwargs: Any) -> nn.Module:
    """Builds the architecture of `build_backbone(backbone, **kwargs)` without reading pre-trained weights.

    For a state dict of one's own that is loaded afterwards: nothing is downloaded, whatever `kwargs` says.

    Args:
        backbone: a name, as for `build_backbone`.
        **kwargs: the arguments that the first `build_backbone` was given.
    """
    return _build(backbone, kwargs, load_weights=False)


def feature_width(backbone: nn.Module) -> int:
    """Width D of the features, found by one forward pass of a blank image.

    The pass runs in eval mode without gradient; training flags and batch-norm statistics are left as they were. The
    image has 64 × 64 pixels, or the side that the network insists on.

    Raises:
        ValueError: the network gives something other than (n, D), or accepts no blank image.
    """
    channels = _image_channels(backbone)
    parameter = next(backbone.parameters(), torch.zeros(()))
    failure: Exception | None = None
    for side in (*_DRY_RUN_SIDES, _own_side(backbone)):
        image = torch.zeros(1, channels, side, side, device=parameter.device, dtype=parameter.dtype)
        try:
            with torch.no_grad(), _evaluating(backbone):
                features = backbone(image)
        except (RuntimeError, ValueError, AssertionError) as error:
            failure = error
            continue
        return _checked_width(backbone, features)
    raise ValueError(
        f"the backbone {type(backbone).__name__} does not run on a blank image (1, {channels}, 64, 64) or "
        f"(1, {channels}, 224, 224): {failure}; give a network that takes images (n, {channels}, H, W)"
    ) from failure


def pixel_statistics(backbone: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels, on the scale 0–1, that the backbone expects its images normalised by.

    timm networks carry their own; torchvision's and all others get ImageNet's. A network that takes another number of
    channels than three gets the mean of the three values, once for each channel.

    Returns:
        mean and std, each with one value a channel.
    """
    config = getattr(backbone, "pretrained_cfg", None) or {}
    mean = tuple(config.get("mean") or IMAGENET_MEAN)
    std = tuple(config.get("std") or IMAGENET_STD)
    channels = _image_channels(backbone)
    if channels != len(mean):
        return (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    return mean, std


def pooled_features(backbone: nn.Module, images: Tensor, pooling: Pooling = "avg") -> Tensor:
    """Features (n, D) of normalised images (n, C, H, W) under another pooling of the last map than the average.

    What follows the pooling in the network, such as ConvNeXt's norm, follows here too.

    Args:
        backbone: a timm network, a torchvision network that ends in a global average pool, or, for `"avg"`, any.
        images: normalised, (n, C, H, W).
        pooling: `"avg"` is `backbone(images)`; `"max"` the largest value over places (for a transformer: over patch
            tokens); `"avgmax"` the mean of average and maximum (METHOD.md §5).

    Raises:
        ValueError: an unknown pooling, or a network whose last map cannot be reached.
    """
    if pooling not in ("avg", "max", "avgmax"):
        raise ValueError(f"pooling={pooling!r} is unknown: choose 'avg', 'max' or 'avgmax'")
    if pooling == "avg":
        features: Tensor = backbone(images)
        return features
    network = getattr(backbone, "_orig_mod", backbone)
    if _is_timm(network):
        return _timm_pooled(network, images, pooling)
    if _is_torchvision(network) and _is_global_average(getattr(network, "avgpool", None)):
        return _torchvision_pooled(network, images, pooling)
    raise ValueError(
        f"pooling={pooling!r} needs the last feature map, which cannot be reached in {type(network).__name__}: "
        "only pooling='avg' is available, unless the backbone is given as a timm or torchvision name"
    )


def _build(backbone: str | nn.Module, kwargs: dict[str, Any], *, load_weights: bool) -> nn.Module:
    if isinstance(backbone, nn.Module):
        if kwargs:
            raise TypeError(
                f"the backbone is already built ({type(backbone).__name__}), so {', '.join(sorted(kwargs))} cannot be "
                "passed on: set them where it is built, or give its name"
            )
        return backbone
    if not isinstance(backbone, str):
        raise TypeError(f"backbone must be a timm name, 'torchvision/<name>' or an nn.Module, not {backbone!r}")
    if "num_classes" in kwargs:
        raise ValueError("backbones give features, not class scores: leave num_classes out")
    try:
        if backbone.startswith(TORCHVISION_PREFIX):
            return _build_torchvision(backbone, kwargs, load_weights)
        return _build_timm(backbone, kwargs, load_weights)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown and unknown[1] in kwargs:
            raise TypeError(
                f"backbone {backbone!r} does not take {unknown[1]!r}: take it out of its arguments"
            ) from None
        raise


def _build_timm(name: str, kwargs: dict[str, Any], load_weights: bool) -> nn.Module:
    import timm  # takes 1.5 s, which nobody should pay who only imports the package

    if ":" not in name and not timm.is_model(name):
        raise ValueError(_unknown_name(name))
    defaults = _PRETRAINED_TRANSFORMER_DEFAULTS if kwargs.get("pretrained") else _TRANSFORMER_DEFAULTS
    if not load_weights:
        kwargs = {k: v for k, v in kwargs.items() if k not in ("pretrained", *_WEIGHT_SOURCES)}
    try:
        network = timm.create_model(name, num_classes=0, **{**defaults, **kwargs})
    except TypeError as error:
        # timm has no public table of which networks take these two; those that do not say so before they build.
        if not any(f"'{default}'" in str(error) for default in defaults.keys() - kwargs.keys()):
            raise
        network = timm.create_model(name, num_classes=0, **kwargs)
    assert isinstance(network, nn.Module)
    return network


def _build_torchvision(full_name: str, kwargs: dict[str, Any], load_weights: bool) -> nn.Module:
    from torchvision import models

    name = full_name.removeprefix(TORCHVISION_PREFIX)
    if name not in models.list_models(module=models):
        raise ValueError(_unknown_name(full_name))
    arguments = dict(kwargs)
    in_chans = arguments.pop("in_chans", 3)
    weights = "DEFAULT" if arguments.pop("pretrained", False) else None
    if not load_weights:
        weights = None
        arguments = {k: v for k, v in arguments.items() if k not in _WEIGHT_SOURCES}
    if models.get_model_builder(name).__module__ == "torchvision.models.resnet":
        arguments.setdefault("zero_init_residual", True)
    network: nn.Module = models.get_model(name, **{"weights": weights, **arguments})
    _take_off_classifier(network, full_name)
    if in_chans != 3:
        _replace_first_convolution(network, in_chans, keep_weights=arguments.get("weights", weights) is not None)
    return network


def _unknown_name(name: str) -> str:
    import timm
    from torchvision import models

    known = [*timm.list_models(), *(TORCHVISION_PREFIX + other for other in models.list_models(module=models))]
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, nearest))}? " if nearest else ""
    return (
        f"unknown backbone {name!r}: {hint}Type a name from timm.list_models(), 'torchvision/<name>' with a name from "
        "torchvision.models.list_models(), or pass an nn.Module that gives (n, D)"
    )


def _take_off_classifier(network: nn.Module, full_name: str) -> None:
    """Replaces the last linear layer by `nn.Identity`, and leaves the norm, pooling and flattening before it."""
    for name in _TORCHVISION_HEADS:
        head = getattr(network, name, None)
        if isinstance(head, nn.Linear):
            setattr(network, name, nn.Identity())
            break
        if isinstance(head, nn.Sequential) and isinstance(head[-1], nn.Linear):
            head[-1] = nn.Identity()
            break
    else:
        raise ValueError(
            f"backbone {full_name!r} does not end in a linear classifier that could be taken off: choose another"
        )
    if getattr(network, "aux_logits", False):
        raise ValueError(
            f"backbone {full_name!r} gives auxiliary scores besides its features while it trains: "
            "pass aux_logits=False and init_weights=True among its arguments"
        )


def _replace_first_convolution(network: nn.Module, in_chans: int, *, keep_weights: bool) -> None:
    """Gives the first convolution `in_chans` input channels; its weights keep their spread, or their channel sum."""
    if in_chans < 1:
        raise ValueError(f"in_chans={in_chans}: an image has at least one channel")
    convolutions = ((path, layer) for path, layer in network.named_modules() if isinstance(layer, nn.Conv2d))
    path, old = next(convolutions, ("", None))
    if old is None or old.in_channels != 3:
        raise ValueError(f"in_chans={in_chans}: {type(network).__name__} has no convolution over 3 channels to replace")
    new = nn.Conv2d(
        in_chans,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None,
        padding_mode=old.padding_mode,
    )
    with torch.no_grad():
        if keep_weights:
            new.weight.copy_(old.weight.mean(dim=1, keepdim=True) * 3 / in_chans)
        else:
            new.weight.normal_(std=old.weight.std().item())
        if new.bias is not None and old.bias is not None:
            new.bias.copy_(old.bias)
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, new)


def _checked_width(backbone: nn.Module, features: object) -> int:
    if isinstance(features, Tensor) and features.ndim == 2 and len(features) == 1:
        return features.shape[1]
    name = type(backbone).__name__
    if isinstance(features, Tensor) and features.ndim == 4:
        raise ValueError(
            f"the backbone {name} gives a map of shape {tuple(features.shape)} where features (n, D) are needed: "
            "wrap it as nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten())"
        )
    given = (
        f"a tensor of shape {tuple(features.shape)}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
    )
    raise ValueError(
        f"the backbone {name} gives {given} for one image where a tensor (1, D) is needed: wrap it in an nn.Module "
        "whose forward returns one vector an image"
    )


def _image_channels(network: nn.Module) -> int:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return 3


def _own_side(network: nn.Module) -> int:
    config = getattr(network, "pretrained_cfg", None) or {}
    side: int = max(config.get("input_size") or (224,))
    return side


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _is_timm(network: nn.Module) -> bool:
    return (
        hasattr(network, "pretrained_cfg") and hasattr(network, "forward_features") and hasattr(network, "forward_head")
    )


def _is_torchvision(network: nn.Module) -> bool:
    return type(network).__module__.startswith("torchvision.models.")


def _is_global_average(layer: object) -> bool:
    return isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1))


def _pool(places: Tensor, dims: int | tuple[int, int], pooling: Pooling) -> Tensor:
    largest = places.amax(dims, keepdim=True)
    return largest if pooling == "max" else (places.mean(dims, keepdim=True) + largest) / 2


def _timm_pooled(network: Any, images: Tensor, pooling: Pooling) -> Tensor:
    """Hands the pooled map to the network's own head as a map of one place, of which any pooling is itself."""
    places = network.forward_features(images)
    if places.ndim == 4:
        one_place = _pool(places, (1, 2) if getattr(network, "output_fmt", "NCHW") == "NHWC" else (2, 3), pooling)
    elif places.ndim == 3 and getattr(network, "global_pool", None) == "avg":
        prefix = getattr(network, "num_prefix_tokens", 0)
        one_place = torch.cat([places[:, :prefix], _pool(places[:, prefix:], 1, pooling)], dim=1)
    else:
        raise ValueError(
            f"pooling={pooling!r} needs the last feature map, and {type(network).__name__} gives shape "
            f"{tuple(places.shape)} with global_pool={getattr(network, 'global_pool', None)!r}: "
            "use pooling='avg', or build the backbone with global_pool='avg'"
        )
    features: Tensor = network.forward_head(one_place)
    return features


def _torchvision_pooled(network: Any, images: Tensor, pooling: Pooling) -> Tensor:
    hook = network.avgpool.register_forward_hook(lambda _layer, inputs, _output: _pool(inputs[0], (2, 3), pooling))
    try:
        features: Tensor = network(images)
    finally:
        hook.remove()
    return features
