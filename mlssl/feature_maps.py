"""The last feature map of a backbone: what it finds at each place of an image."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mlssl.private import uncompiled


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
    if hasattr(network, "forward_features") and hasattr(network, "forward_head"):
        return _of_timm(network, images)
    pool = getattr(network, "avgpool", None)
    if isinstance(pool, nn.AdaptiveAvgPool2d) and pool.output_size in (1, (1, 1)):
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
