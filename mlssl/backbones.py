"""Backbones: any timm name, `torchvision/<name>`, or a custom module, with features (n, D)."""

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

# Arguments about the source of weights and pixel statistics, not about the architecture.
_DESCRIBING = frozenset({"pretrained_cfg", "pretrained_cfg_overlay"})
_READING = frozenset({"pretrained", "checkpoint_path", "cache_dir", "weights", "progress"})
_TORCHVISION_HEADS = ("fc", "classifier", "heads", "head")


def build_backbone(backbone: str | nn.Module, **kwargs: Any) -> nn.Module:
    """Build a network from normalised images (n, C, H, W) to features (n, D).

    The last batch-norm scale of each residual block starts at 0 if timm or torchvision supports it. timm's vision
    transformers accept any image size and average their patch tokens, unless `dynamic_img_size` or `global_pool` is
    given. A network built by name stores it, see :func:`built_as`.

    Args:
        backbone: A timm name (`"resnet50"`, `"vit_small_patch16_224"`), `"torchvision/<name>"`, or a module, which is
            returned unchanged.
        **kwargs: Passed to the constructor. `pretrained=True` loads the published weights of either library,
            `checkpoint_path=file` those of a file in the library's own names, for torchvision with or without a
            classifier, and `in_chans=C` (default 3) sets the number of image channels.

    Raises:
        ValueError: The name is unknown (suggests the nearest), `num_classes` is given, the weights of a file do not
            fit, or a torchvision network has no linear classifier to remove (squeezenet) or has auxiliary ones.
        FileNotFoundError: There is no file at `checkpoint_path`.
        TypeError: The network does not take an argument, or arguments are given together with a module.
    """
    if isinstance(backbone, nn.Module):
        if kwargs:
            raise TypeError(
                f"The backbone is a {type(backbone).__name__} already, so {', '.join(sorted(kwargs))} cannot be passed "
                "on: set them when building it, or pass its name."
            )
        return backbone
    if not isinstance(backbone, str):
        raise TypeError(f"backbone={backbone!r} was given: pass a timm name, 'torchvision/<name>' or an nn.Module.")
    return _build(backbone, kwargs, _READING | _DESCRIBING)


def rebuild_backbone(backbone: str, **kwargs: Any) -> nn.Module:
    """Build the architecture of `build_backbone(backbone, **kwargs)`, to load weights into it afterwards.

    No weights are read or downloaded, even if `pretrained=True` is among the arguments.
    """
    return _build(backbone, kwargs, _DESCRIBING)


def built_as(network: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """Name and architecture arguments with which its library builds the network.

    The arguments are complete, including timm's image size and pooling of transformers, except those that read weights.
    None for a network not built by name.
    """
    origin: tuple[str, dict[str, Any]] | None = getattr(network, "built_as", None)
    return origin


def feature_width(backbone: nn.Module) -> int:
    """Width D of the features, from one forward pass of a blank image.

    The pass runs in eval mode without gradient; training flags and batch-norm statistics do not change.

    Raises:
        ValueError: The network does not return (n, D), or fails on a blank image.
    """
    return _checked_width(backbone, _first_run(backbone)[1])


def image_shape(backbone: nn.Module) -> tuple[int, int, int]:
    """Shape (C, H, W) of the smallest square image that the network accepts: 64 or 224 pixels, or timm's default size.

    Raises:
        ValueError: The network accepts none of them.
    """
    return _first_run(backbone)[0]


def check_image_size(backbone: nn.Module, height: int, width: int) -> None:
    """Check with one forward pass of a blank image in eval mode that the network accepts an image size.

    Raises:
        ValueError: It does not, for example a transformer of fixed image size, or one whose patches do not fill the
            image.
    """
    backbone = uncompiled(backbone)  # avoid compiling once for one image and again for many
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
    """Whether the network also accepts images twice as high and three times as wide as `shape` (C, H, W)."""
    try:
        check_image_size(backbone, 2 * shape[1], 3 * shape[2])
    except ValueError:
        return False
    return True


def pixel_statistics(backbone: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, on the scale 0–1, for normalising the backbone's input.

    timm networks define their own; torchvision's and all others get ImageNet's. A network without exactly three
    channels gets the mean of the three values for each channel.

    Returns:
        mean and std, each with one value per channel.
    """
    config = getattr(backbone, "pretrained_cfg", None) or {}
    mean = tuple(config.get("mean") or IMAGENET_MEAN)
    std = tuple(config.get("std") or IMAGENET_STD)
    channels = _channels(backbone)
    if channels != len(mean):
        return (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    return mean, std


def _build(name: str, kwargs: dict[str, Any], passed_on: frozenset[str]) -> nn.Module:
    """Build by name; of the weight arguments use only `passed_on`."""
    if "num_classes" in kwargs:
        raise ValueError("num_classes was given, but a backbone has no classifier: leave it out.")
    weights = {key: value for key, value in kwargs.items() if key in passed_on}
    architecture = {key: value for key, value in kwargs.items() if key not in _READING | _DESCRIBING}
    file = weights.get("checkpoint_path")
    if file and not Path(file).is_file():
        raise FileNotFoundError(f"There are no weights at {file}: pass a .safetensors or .pth file as checkpoint_path.")
    if architecture.get("in_chans") == 3:  # the default; torchvision has no argument for it
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
            f"The weights of backbone {name!r} cannot be fetched, their server did not answer ({error}): check the "
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
    """Build the network, and return its arguments with the defaults for transformers.

    A transformer sees views of one size and whole images of another, and its class token is not trained, so it gets
    dynamic image size and the average over patch tokens. Published weights have their norm before the pooling; timm
    would drop it for that average.
    """
    import timm  # takes over a second, which importing the package should not

    if ":" not in name and not timm.is_model(name):
        raise ValueError(_unknown_name(name))
    # Swin calls it strict_img_size; before timm 1.0.31 it ignores dynamic_img_size.
    arguments = {"dynamic_img_size": True, "strict_img_size": False, "global_pool": "avg"}
    arguments |= ({"fc_norm": False} if pretrained else {}) | architecture
    while True:
        try:
            return timm.create_model(name, num_classes=0, **arguments, **weights), arguments
        except TypeError as error:
            # timm has no table of the networks that take these arguments; the others raise before building.
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
    """Replace the last linear layer with `nn.Identity`; norm, pooling and flattening before it stay."""
    if getattr(network, "aux_logits", False):
        raise ValueError(
            f"Backbone {full_name!r} returns auxiliary scores in addition to its features in training: pass "
            "aux_logits=False "
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
        f"Backbone {full_name!r} does not end in a linear classifier that can be removed: choose another, or pass it "
        "as an nn.Module with features (n, D)."
    )


def _replace_first_convolution(network: nn.Module, in_chans: int, *, keep_weights: bool) -> None:
    """Set the inputs of the first convolution: loaded weights keep their sum over channels, new ones their std."""
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
    """Shape of the smallest blank image that the network accepts, and its output."""
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
