"""The last feature map of a backbone: pooled in another way than by the average, or as it is, place by place."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mlssl.choices import Pooling
from mlssl.private import uncompiled


def pooled_features(backbone: nn.Module, images: Tensor, pooling: Pooling = "avg") -> Tensor:
    """Features (n, D) of normalised images (n, C, H, W) under another pooling of the last map than the average.

    What follows the pooling in the network, such as ConvNeXt's norm, follows here too.

    Args:
        backbone: a timm network, a torchvision network that ends in a global average pool, or, for `"avg"`, any.
        images: normalised, (n, C, H, W).
        pooling: `"avg"` is `backbone(images)`; `"max"` the largest value over places (for a transformer: over patch
            tokens); `"avgmax"` the mean of average and maximum, as in the published linear evaluation.

    Raises:
        ValueError: an unknown pooling, or a network whose last map cannot be reached.
    """
    if pooling not in ("avg", "max", "avgmax"):
        raise ValueError(f"pooling={pooling!r} is unknown: choose 'avg', 'max' or 'avgmax'")
    if pooling == "avg":
        features: Tensor = backbone(images)
        return features
    network = uncompiled(backbone)
    if _is_timm(network):
        return _timm_pooled(network, images, pooling)
    if _is_torchvision(network) and _is_global_average(getattr(network, "avgpool", None)):
        return _torchvision_pooled(network, images, pooling)
    raise ValueError(
        f"pooling={pooling!r} needs the last feature map, which cannot be reached in {type(network).__name__}: "
        "only pooling='avg' is available, unless the backbone is given as a timm or torchvision name"
    )


def feature_map(backbone: nn.Module, images: Tensor) -> Tensor:
    """Features of each place of images: what the backbone would give if its last map were that place alone.

    Where nothing but an average pool follows the map, as in ResNets, the mean over the places is `backbone(images)`.
    Where a norm or a layer follows the pooling, as in ConvNeXt, it is applied at each place.

    Args:
        backbone: A timm network whose last map or patch tokens can be reached, or a torchvision network that ends in a
            global average pool and nothing else.
        images: Normalised, (n, C, H, W).

    Returns:
        (n, D, h, w), D the width of the features.

    Raises:
        ValueError: If the map cannot be reached.
    """
    network: Any = uncompiled(backbone)
    if _is_timm(network):
        return _of_timm(network, images)
    pool: Any = getattr(network, "avgpool", None)
    if _is_global_average(pool):
        return _before_pool(network, pool, images)
    raise ValueError(f"The last feature map of {type(network).__name__} cannot be reached: {_REMEDY}")


_REMEDY = "give a backbone of timm, or one of torchvision's ResNets"


def _of_timm(network: Any, images: Tensor) -> Tensor:
    places = network.forward_features(images)
    if places.ndim == 4:
        if getattr(network, "output_fmt", "NCHW") == "NHWC":
            places = places.permute(0, 3, 1, 2)
        count, width, height, across = places.shape
        alone = places.permute(0, 2, 3, 1).reshape(-1, width, 1, 1)
        if getattr(network, "output_fmt", "NCHW") == "NHWC":
            alone = alone.permute(0, 2, 3, 1)
    elif places.ndim == 3 and getattr(network, "global_pool", None) == "avg":
        tokens = places[:, getattr(network, "num_prefix_tokens", 0) :]
        count, number, width = tokens.shape
        height, across = _grid(network, images, number)
        prefix = places[:, : getattr(network, "num_prefix_tokens", 0)].repeat_interleave(number, 0)
        alone = torch.cat([prefix, tokens.reshape(-1, 1, width)], dim=1)
    else:
        raise ValueError(
            f"The last feature map of {type(network).__name__} cannot be reached, it gives shape {tuple(places.shape)} "
            f"with global_pool={getattr(network, 'global_pool', None)!r}: {_REMEDY} that averages its places"
        )
    features: Tensor = network.forward_head(alone)
    return features.view(count, height, across, -1).permute(0, 3, 1, 2)


def _grid(network: Any, images: Tensor, number: int) -> tuple[int, int]:
    """Rows and columns of the patches."""
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    rows, columns = (
        (math.ceil(side / one) for side, one in zip(images.shape[-2:], patch, strict=True)) if patch else (0, 0)
    )
    if rows * columns != number:
        raise ValueError(
            f"The {number} patches of {type(network).__name__} are on no grid that is known for images of "
            f"{images.shape[-2]} × {images.shape[-1]} pixels: {_REMEDY}"
        )
    return rows, columns


def _before_pool(network: nn.Module, pool: nn.Module, images: Tensor) -> Tensor:
    found: list[Tensor] = []
    hook = pool.register_forward_hook(lambda _layer, inputs, _output: found.append(inputs[0]))
    try:
        features = network(images)
    finally:
        hook.remove()
    if found[0].shape[1] != features.shape[1]:
        raise ValueError(
            f"The last feature map of {type(network).__name__} has {found[0].shape[1]} channels and its features "
            f"{features.shape[1]}: {_REMEDY}"
        )
    return found[0]


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
