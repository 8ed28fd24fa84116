"""The last feature map of a backbone: with other pooling than the average, or unpooled."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mlssl.choices import Pooling
from mlssl.private import uncompiled


def same_features(now: Tensor, then: Tensor) -> bool:
    """Whether saved features (D,) are those of now, up to 1 % of the largest value, as on another device."""
    return now.shape == then.shape and bool((now - then).abs().max() <= 1e-2 * now.abs().max())


def pooled_features(backbone: nn.Module, images: Tensor, pooling: Pooling = "avg") -> Tensor:
    """Features (n, D) of normalised images (n, C, H, W) with a chosen pooling of the last map.

    Layers after the pooling, such as ConvNeXt's norm, are applied too.

    Args:
        backbone: a timm network, a torchvision network that ends in a global average pool, or, for `"avg"`, any.
        images: normalised, (n, C, H, W).
        pooling: `"avg"` is `backbone(images)`; `"max"` the maximum over positions (for a transformer: over patch
            tokens); `"avgmax"` the mean of average and maximum, as in the published linear evaluation.

    Raises:
        ValueError: The pooling is unknown, or the network's last map cannot be accessed.
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
        f"pooling={pooling!r} needs the last feature map, which cannot be accessed in {type(network).__name__}: "
        "only pooling='avg' is available, unless the backbone is given as a timm or torchvision name"
    )


def feature_map(backbone: nn.Module, images: Tensor) -> Tensor:
    """Features of each position: the backbone's output if its last map were only that position.

    If only an average pool follows the map, as in ResNets, the mean over positions is `backbone(images)`. A norm or
    layer after the pooling, as in ConvNeXt, is applied at each position.

    Args:
        backbone: A timm network with an accessible last map or patch tokens, or a torchvision network that ends in a
            global average pool.
        images: Normalised, (n, C, H, W).

    Returns:
        (n, D, h, w) with feature width D.

    Raises:
        ValueError: The map cannot be accessed.
    """
    network: Any = uncompiled(backbone)
    if _is_timm(network):
        return _of_timm(network, images)
    pool: Any = getattr(network, "avgpool", None)
    if _is_global_average(pool):
        return _before_pool(network, pool, images)
    raise ValueError(f"The last feature map of {type(network).__name__} cannot be accessed: {_REMEDY}")


_REMEDY = "pass a timm backbone, or a torchvision ResNet"


def _of_timm(network: Any, images: Tensor) -> Tensor:
    positions = network.forward_features(images)
    if positions.ndim == 4:
        if getattr(network, "output_fmt", "NCHW") == "NHWC":
            positions = positions.permute(0, 3, 1, 2)
        count, width, height, across = positions.shape
        alone = positions.permute(0, 2, 3, 1).reshape(-1, width, 1, 1)
        if getattr(network, "output_fmt", "NCHW") == "NHWC":
            alone = alone.permute(0, 2, 3, 1)
    elif positions.ndim == 3 and getattr(network, "global_pool", None) == "avg":
        tokens = positions[:, getattr(network, "num_prefix_tokens", 0) :]
        count, number, width = tokens.shape
        height, across = _grid(network, images, number)
        prefix = positions[:, : getattr(network, "num_prefix_tokens", 0)].repeat_interleave(number, 0)
        alone = torch.cat([prefix, tokens.reshape(-1, 1, width)], dim=1)
    else:
        raise ValueError(
            f"The last feature map of {type(network).__name__} cannot be accessed, it gives shape "
            f"{tuple(positions.shape)} with global_pool={getattr(network, 'global_pool', None)!r}: {_REMEDY} that "
            "averages its positions"
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
            f"The {number} patches of {type(network).__name__} do not form a known grid for images of "
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


def _pool(positions: Tensor, dims: int | tuple[int, int], pooling: Pooling) -> Tensor:
    largest = positions.amax(dims, keepdim=True)
    return largest if pooling == "max" else (positions.mean(dims, keepdim=True) + largest) / 2


def _timm_pooled(network: Any, images: Tensor, pooling: Pooling) -> Tensor:
    """Passes the pooled map to the network's head as a map with one position, which any pooling leaves unchanged."""
    positions = network.forward_features(images)
    if positions.ndim == 4:
        one_place = _pool(positions, (1, 2) if getattr(network, "output_fmt", "NCHW") == "NHWC" else (2, 3), pooling)
    elif positions.ndim == 3 and getattr(network, "global_pool", None) == "avg":
        prefix = getattr(network, "num_prefix_tokens", 0)
        one_place = torch.cat([positions[:, :prefix], _pool(positions[:, prefix:], 1, pooling)], dim=1)
    else:
        raise ValueError(
            f"pooling={pooling!r} needs the last feature map, and {type(network).__name__} gives shape "
            f"{tuple(positions.shape)} with global_pool={getattr(network, 'global_pool', None)!r}: "
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
