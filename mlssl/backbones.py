"""Backbones: any timm name, `torchvision/<name>`, or a module of one's own, all giving features (n, D)."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mlssl.modes import eval_mode
from mlssl.private import uncompiled
from mlssl.waiting import downloads_end

TORCHVISION_PREFIX = "torchvision/"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Arguments that say where weights and pixel statistics come from, not what the network looks like.
_DESCRIBING = frozenset({"pretrained_cfg", "pretrained_cfg_overlay"})
_READING = frozenset({"pretrained", "checkpoint_path", "cache_dir", "weights", "progress"})
_TORCHVISION_HEADS = ("fc", "classifier", "heads", "head")


def build_backbone(backbone: str | nn.Module, **kwargs: Any) -> nn.Module:
    """Build a network that takes normalised images (n, C, H, W) and gives features (n, D).

    The last batch-norm scale of each residual block starts at 0 wherever timm or torchvision can do so.
    timm's vision transformers take any image size and average their patch tokens, unless `dynamic_img_size` or
    `global_pool` say otherwise. A network built by name remembers it, see :func:`built_as`.

    Args:
        backbone: A timm name (`"resnet50"`, `"vit_small_patch16_224"`), `"torchvision/<name>"`, or a module, which
            is returned as it is.
        **kwargs: Passed to the constructor. `pretrained=True` loads the published weights of either library,
            `checkpoint_path=file` those of a file in the library's own names, for torchvision with or without a
            classifier, and `in_chans=C` (default 3) sets the number of image channels.

    Raises:
        ValueError: On an unknown name (names the nearest), on `num_classes`, on a file of other weights, and for a
            torchvision network without a linear classifier to take off (squeezenet) or with auxiliary ones.
        FileNotFoundError: If no file stands at `checkpoint_path`.
        TypeError: On an argument that the network does not take, and on any argument together with a module.
    """
    if isinstance(backbone, nn.Module):
        if kwargs:
            raise TypeError(
                f"The backbone is a {type(backbone).__name__} already, so {', '.join(sorted(kwargs))} cannot be passed "
                "on: set them where it is built, or give its name."
            )
        return backbone
    if not isinstance(backbone, str):
        raise TypeError(f"backbone={backbone!r} was given: pass a timm name, 'torchvision/<name>' or an nn.Module.")
    return _build(backbone, kwargs, _READING | _DESCRIBING)


def rebuild_backbone(backbone: str, **kwargs: Any) -> nn.Module:
    """Build the architecture of `build_backbone(backbone, **kwargs)` for weights that are loaded afterwards.

    No weights are read or downloaded, even if `pretrained=True` is among the arguments.
    """
    return _build(backbone, kwargs, _DESCRIBING)


def built_as(network: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """Name and architecture arguments by which the library that it comes from builds the network.

    Arguments are complete, timm's image size and pooling of transformers included, but for those that read weights.
    None for a network that was not built by name.
    """
    origin: tuple[str, dict[str, Any]] | None = getattr(network, "built_as", None)
    return origin


def feature_width(backbone: nn.Module) -> int:
    """Find the width D of the features by one forward pass of a blank image.

    The pass runs in eval mode without gradient; training flags and batch-norm statistics are left as they were.

    Raises:
        ValueError: If the network gives something other than (n, D), or takes no blank image.
    """
    return _checked_width(backbone, _first_run(backbone)[1])


def image_shape(backbone: nn.Module) -> tuple[int, int, int]:
    """Shape (C, H, W) of the smallest square image that the network takes: 64 or 224 pixels wide, or timm's own size.

    Raises:
        ValueError: If the network takes none of them.
    """
    return _first_run(backbone)[0]


def check_image_size(backbone: nn.Module, height: int, width: int) -> None:
    """Find out, by one forward pass of a blank image in eval mode, whether the network takes images of a size.

    Raises:
        ValueError: If it does not, as a transformer of fixed image size, or one whose patches do not fill the image.
    """
    backbone = uncompiled(backbone)  # compiled for one image, it would be compiled again for many
    parameter = next(backbone.parameters(), torch.zeros(()))
    image = torch.zeros(1, _channels(backbone), height, width, device=parameter.device, dtype=parameter.dtype)
    try:
        with eval_mode(backbone):
            backbone(image)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"The backbone {type(backbone).__name__} takes no images of {height} × {width} pixels ({error}): choose a "
            "size that it takes; a vision transformer takes its own, or with dynamic_img_size=True multiples of its "
            "patch size."
        ) from None


def takes_other_sizes(backbone: nn.Module, shape: tuple[int, int, int]) -> bool:
    """Whether the network also takes images twice as high and three times as wide as those of `shape` (C, H, W)."""
    try:
        check_image_size(backbone, 2 * shape[1], 3 * shape[2])
    except ValueError:
        return False
    return True


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
    channels = _channels(backbone)
    if channels != len(mean):
        return (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    return mean, std


def _build(name: str, kwargs: dict[str, Any], passed_on: frozenset[str]) -> nn.Module:
    """Build by name; of the arguments about weights, only those that are `passed_on`."""
    if "num_classes" in kwargs:
        raise ValueError("num_classes was given, and a backbone gives features, not class scores: leave it out.")
    weights = {key: value for key, value in kwargs.items() if key in passed_on}
    architecture = {key: value for key, value in kwargs.items() if key not in _READING | _DESCRIBING}
    file = weights.get("checkpoint_path")
    if file and not Path(file).is_file():
        raise FileNotFoundError(f"No weights stand at {file}: give a .safetensors or .pth file as checkpoint_path.")
    if architecture.get("in_chans") == 3:  # everybody's default, which torchvision has no argument for
        del architecture["in_chans"]
    try:
        with downloads_end():
            if name.startswith(TORCHVISION_PREFIX):
                network = _build_torchvision(name, architecture, weights)
            else:
                pretrained = bool(kwargs.get("pretrained"))
                network, architecture = _build_timm(name, architecture, weights, pretrained=pretrained)
    except TimeoutError as error:
        raise OSError(
            f"The weights of backbone {name!r} cannot be fetched, their server gave no answer ({error}): look at the "
            "connection, or pass a file, checkpoint_path=FILE."
        ) from error
    except TypeError as error:
        unknown = _unexpected_argument(error)
        if unknown not in kwargs:
            raise
        raise TypeError(f"Backbone {name!r} does not take {unknown!r}: leave it out of its arguments.") from None
    except (RuntimeError, UnpicklingError, SafetensorError) as error:
        if not file:
            raise
        hint = "one with a classifier is read by pretrained=True, pretrained_cfg_overlay={'file': …}"
        of_timm = "" if name.startswith(TORCHVISION_PREFIX) else f"; {hint}"
        raise ValueError(f"The weights in {file} do not fit backbone {name!r}{of_timm}: {error}") from None
    network.built_as = (name, architecture)  # type: ignore[assignment]
    return network


def _build_timm(
    name: str, architecture: dict[str, Any], weights: dict[str, Any], *, pretrained: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """Build, and tell the architecture's arguments with those that transformers are given here.

    A transformer sees views of one size and whole images of another, and nothing trains its class token, so it gets
    dynamic image size and the average over patch tokens. Published weights have their norm in front of the pooling,
    where timm would drop it for that average.
    """
    import timm  # takes over a second, which a mere import of the package should not pay

    if ":" not in name and not timm.is_model(name):
        raise ValueError(_unknown_name(name))
    # strict_img_size is Swin's word for it; before timm 1.0.31 it swallows dynamic_img_size without effect.
    arguments = {"dynamic_img_size": True, "strict_img_size": False, "global_pool": "avg"}
    arguments |= ({"fc_norm": False} if pretrained else {}) | architecture
    while True:
        try:
            return timm.create_model(name, num_classes=0, **arguments, **weights), arguments
        except TypeError as error:
            # timm has no table of which networks take these arguments; one that does not says so before it builds.
            refused = _unexpected_argument(error)
            if refused not in arguments.keys() - architecture.keys():
                raise
            if refused in ("fc_norm", "strict_img_size"):
                del arguments[refused]
            else:
                arguments = architecture


def _build_torchvision(full_name: str, architecture: dict[str, Any], weights: dict[str, Any]) -> nn.Module:
    from torchvision import models

    name = full_name.removeprefix(TORCHVISION_PREFIX)
    if name not in models.list_models(module=models):
        raise ValueError(_unknown_name(full_name))
    arguments = architecture | weights
    in_chans = arguments.pop("in_chans", 3)
    file = arguments.pop("checkpoint_path", None)
    if arguments.pop("pretrained", False):
        arguments.setdefault("weights", "DEFAULT")
    if models.get_model_builder(name).__module__ == "torchvision.models.resnet":
        arguments.setdefault("zero_init_residual", True)
    network: nn.Module = models.get_model(name, **arguments)
    whole = network.state_dict().keys()
    _take_off_classifier(network, full_name)
    if file:
        classifier = whole - network.state_dict().keys()
        network.load_state_dict({k: v for k, v in _read_weights(Path(file)).items() if k not in classifier})
    if in_chans != 3:
        _replace_first_convolution(network, in_chans, keep_weights=bool(file or arguments.get("weights")))
    return network


def _read_weights(file: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor]
    if file.suffix == ".safetensors":
        weights = load_file(file)
    else:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    return weights


def _unexpected_argument(error: TypeError) -> str | None:
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return found[1] if found else None


def _unknown_name(name: str) -> str:
    import timm
    from torchvision import models

    known = [*timm.list_models(), *(TORCHVISION_PREFIX + other for other in models.list_models(module=models))]
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return (
        f"Unknown backbone {name!r}: {f'did you mean {_alternatives(nearest)}? Or ' if nearest else ''}type a name "
        "from timm.list_models(), 'torchvision/<name>' with one from torchvision.models.list_models(), or pass an "
        "nn.Module that gives features (n, D)."
    )


def _alternatives(names: list[str]) -> str:
    return " or ".join(map(repr, names))


def _take_off_classifier(network: nn.Module, full_name: str) -> None:
    """Replace the last linear layer by `nn.Identity`; norm, pooling and flattening before it stay."""
    if getattr(network, "aux_logits", False):
        raise ValueError(
            f"Backbone {full_name!r} gives auxiliary scores beside its features while it trains: pass aux_logits=False "
            "and init_weights=True among its arguments."
        )
    for name in _TORCHVISION_HEADS:
        head = getattr(network, name, None)
        if isinstance(head, nn.Linear):
            setattr(network, name, nn.Identity())
            return
        if isinstance(head, nn.Sequential) and isinstance(head[-1], nn.Linear):
            head[-1] = nn.Identity()
            return
    raise ValueError(
        f"Backbone {full_name!r} does not end in a linear classifier that could be taken off: choose another, or pass "
        "it as an nn.Module that gives features (n, D)."
    )


def _replace_first_convolution(network: nn.Module, in_chans: int, *, keep_weights: bool) -> None:
    """Give the first convolution `in_chans` inputs: loaded weights keep their sum over channels, fresh their std."""
    if in_chans < 1:
        raise ValueError(f"in_chans={in_chans} was given: an image has at least one channel.")
    convolutions = ((path, layer) for path, layer in network.named_modules() if isinstance(layer, nn.Conv2d))
    path, old = next(convolutions)
    shape = {name: getattr(old, name) for name in ("out_channels", "kernel_size", "stride", "padding", "padding_mode")}
    new = nn.Conv2d(in_chans, bias=old.bias is not None, **shape)
    with torch.no_grad():
        if keep_weights:
            new.weight.copy_(old.weight.mean(dim=1, keepdim=True) * old.in_channels / in_chans)
        else:
            new.weight.normal_(std=old.weight.std().item())
        if new.bias is not None and old.bias is not None:
            new.bias.copy_(old.bias)
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, new)


def _first_run(backbone: nn.Module) -> tuple[tuple[int, int, int], object]:
    """Shape of the smallest blank image that the network takes, and what it gives for it."""
    config = getattr(backbone, "pretrained_cfg", None) or {}
    own_side = max(config.get("input_size") or (224,))
    shapes = [(_channels(backbone), side, side) for side in sorted({64, 224, own_side})]
    parameter = next(backbone.parameters(), torch.zeros(()))
    failure: Exception | None = None
    for shape in shapes:
        image = torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype)
        try:
            with eval_mode(backbone):
                return shape, backbone(image)
        except (RuntimeError, ValueError, AssertionError) as error:
            failure = error
    raise ValueError(
        f"The backbone {type(backbone).__name__} runs on none of the blank images {shapes} ({failure}): "
        "pass a network that takes images (n, C, H, W)."
    ) from failure


def _channels(backbone: nn.Module) -> int:
    return next((layer.in_channels for layer in backbone.modules() if isinstance(layer, nn.Conv2d)), 3)


def _checked_width(backbone: nn.Module, features: object) -> int:
    if not isinstance(features, Tensor):
        given = f"a {type(features).__name__}"
    elif features.ndim == 2 and len(features) == 1:
        return features.shape[1]
    else:
        given = f"shape {tuple(features.shape)}"
    is_map = isinstance(features, Tensor) and features.ndim == 4
    remedy = "nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten())" if is_map else "a module that returns (n, D)"
    raise ValueError(
        f"The backbone {type(backbone).__name__} gives {given} for one image where (1, D) is needed: "
        f"wrap it as {remedy}."
    )
