"""Sources of backbones: a Lightning checkpoint, an exported file, a module, or a name with or without weights."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mlssl.backbones import build_backbone, built_as, pixel_statistics, rebuild_backbone
from mlssl.private import uncompiled
from mlssl.run_folder import checkpoint_at
from mlssl.weights.checkpoints import (
    architecture,
    check_holds,
    check_received_backbone,
    holds_shards,
    load_checkpoint,
    load_plain,
    misfit,
    nearest_network,
    plain_name,
    weights_of,
)
from mlssl.weights.history import history_of_checkpoint, history_of_module
from mlssl.weights.pretrained import asks_for_weights, published_backbone
from mlssl.weights.published import NESTED, has_norm_before_pooling, of_encoder

TIMM_CONFIG = "config.json"
TIMM_WEIGHTS = "model.safetensors"
"""The two files of a timm ``local-dir:`` folder."""

DIGEST = "sha256"
"""Header entry of an exported file: digest of its tensors, to detect corruption."""

_CLASSIFIERS = ("fc.", "head.", "heads.", "classifier.")


class Backbone(nn.Module):
    """A backbone with its name, arguments, pixel statistics and history.

    Args:
        backbone: Network from normalised images to features (n, D); not copied.
        mean: One number per channel, in 0–1; None for the network's default.
        std: Likewise, above 0.
        history: Steps, settings of model and data, and metrics, if the source has them.

    Attributes:
        name: Name for `build_backbone`; None for a custom network.
        arguments: Constructor arguments.
        untrained: Whether it was opened by name only, so that its weights are random.
    """

    untrained = False

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        history: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        backbone = uncompiled(backbone)
        own_mean, own_std = pixel_statistics(backbone)
        # A timm network built elsewhere knows its name; assume no arguments until its weights are compared.
        config = getattr(backbone, "pretrained_cfg", None) or {}
        self.name: str | None
        self.arguments: dict[str, Any]
        self.name, self.arguments = built_as(backbone) or (config.get("architecture"), {})
        self.backbone = backbone
        self.mean, self.std = tuple(mean or own_mean), tuple(std or own_std)
        self.history = history or {}
        self.register_buffer("pixel_mean", torch.tensor(self.mean).view(1, -1, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(self.std).view(1, -1, 1, 1))

    def normalize(self, images: Tensor) -> Tensor:
        """Convert images uint8 (n, C, H, W) to floats normalised by mean and std."""
        pixels = (images.float() / 255 - self.pixel_mean) / self.pixel_std
        return pixels.contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 (n, C, H, W) to features (n, D)."""
        features: Tensor = self.backbone(self.normalize(images))
        return features

    def frozen(self) -> Backbone:
        """The same object in eval mode, without gradients and channels last."""
        self.requires_grad_(False).eval()
        self.backbone.to(memory_format=torch.channels_last)
        return self

    def plain_copy(self) -> Backbone:
        """A copy in float32, contiguous, in eval mode, on the CPU."""
        copied = copy.deepcopy(self).to("cpu", torch.float32)
        copied.backbone.to(memory_format=torch.contiguous_format)
        return copied.eval()


def open_backbone(source: str, *, seed: int = 0) -> Backbone:
    """Open a backbone, frozen, without running code in a file.

    ===================================  ==================================================================
    source                               is
    ===================================  ==================================================================
    ``runs/fit-…``                       a run folder, whose last checkpoint is used
    ``runs/…/last.ckpt``                 a Lightning checkpoint of a `MultiLabelSSLModule`, or FSDP's folder of shards
    ``backbone.safetensors``             a file of `mlssl.export_backbone`, whose header names the backbone, or its
                                         folder of format "timm-dir"
    ``resnet50=weights.pth``             a timm name, or ``torchvision/<name>``, with the weights of a local file
    ``resnet50.a1_in1k``                 a timm name with the tag of published weights, cached or downloaded by timm
    ``resnet50:pretrained``              the same with the library's default weights; for torchvision's names as well
    ``resnet50``                         the same, untrained
    ===================================  ==================================================================

    Weights are loaded strictly, except for a classifier, which is ignored. Prefixes of `torch.compile`, DDP and our own
    module are removed. From MoCo's published files the trained encoder is loaded, without momentum copy, queue and
    heads; DINO's files work unchanged, ``vit_small_patch16_224=dino_vits16.pth``.

    Args:
        source: See the table.
        seed: Seed of untrained weights; the global random state does not change.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: The name is unknown; a file is not a checkpoint, is damaged, contains code, does not name its
            backbone, or has weights that do not fit (missing and unexpected ones are named); or published weights
            cannot be loaded.
    """
    path = checkpoint_at(Path(source))
    name, equals, file = source.partition("=")
    if equals and not path.exists():  # checkpoint names contain "=": epoch=9-step=700.ckpt
        _check_exists(Path(file))
        return _with_weights(name, {}, _read_weights(Path(file)), file).frozen()
    if (path / TIMM_CONFIG).is_file():
        path /= TIMM_WEIGHTS
    if path.suffix == ".safetensors":
        _check_exists(path)
        return _exported(path).frozen()
    if path.suffix in (".ckpt", ".pth", ".pt", ".bin") or path.is_file() or holds_shards(path):
        if not path.is_dir():
            _check_exists(path)
        return _of_checkpoint(path).frozen()
    untrained = not asks_for_weights(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network = build_backbone(source) if untrained else published_backbone(source)
        except ValueError:
            if path.is_dir():
                load_checkpoint(path)  # raises an error about the kind of folder
            raise
    opened = Backbone(network).frozen()
    opened.untrained = untrained
    return opened


def open_network(source: str | os.PathLike[str] | nn.Module, network: str = "backbone") -> Backbone:
    """One network of a checkpoint or of a module with a `.backbone`, or the module itself; not copied.

    Args:
        source: Path of a checkpoint or run folder, or a module.
        network: Name of the submodule; one other than the backbone has the backbone's architecture.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: The network does not exist, the source does not describe it, its weights do not fit, or the file
            contains pickled code.
    """
    if not isinstance(source, nn.Module):
        return _of_checkpoint(checkpoint_at(Path(source)), network)
    source = getattr(source, "module", source) if type(source).__name__ == "DistributedDataParallel" else source
    backbone = getattr(source, "backbone", None)
    if network == "backbone" and not isinstance(backbone, nn.Module):
        return Backbone(source)
    try:
        inner = source.get_submodule(network)
    except AttributeError:
        names = [name for name, _ in source.named_parameters()]
        raise ValueError(
            f"{type(source).__name__} has no network {network!r}: {nearest_network(network, names)}"
        ) from None
    mean, std = (_numbers(getattr(source, name, None)) for name in ("pixel_mean", "pixel_std"))
    return Backbone(inner, mean, std, history_of_module(source))


def backbone_of(checkpoint: Mapping[str, Any], path: Path, network: str = "backbone") -> Backbone:
    """One network of a loaded checkpoint; see :func:`open_network`."""
    check_holds(checkpoint, network, path)
    weights = weights_of(checkpoint, network)
    name, arguments, mean, std = architecture(checkpoint, path)
    built = _rebuilt(name, arguments, str(path))
    wrong = misfit(built, weights)
    if wrong:
        raise ValueError(f"The weights of {network!r} in {path} do not fit its backbone {name!r}: {wrong}.")
    built.load_state_dict(weights)
    _check_channels(built, mean, std, path)
    return Backbone(built, mean, std, history_of_checkpoint(checkpoint))


def _of_checkpoint(path: Path, network: str = "backbone") -> Backbone:
    return backbone_of(load_checkpoint(path), path, network)


def _exported(path: Path) -> Backbone:
    return backbone_of_file(*read_safetensors(path, "export it again"), path)


def backbone_of_file(header: Mapping[str, str], weights: Mapping[str, Tensor], path: Path) -> Backbone:
    """The backbone of an exported file, built from its header, with the backbone's tensors.

    Raises:
        ValueError: The header does not name a backbone that can be built without running code, or the weights do not
            fit.
    """
    name = header.get("backbone")
    if name is None or "arguments" not in header:
        raise ValueError(f"{path} does not name its backbone: also pass the name, such as resnet50={path}")
    arguments, mean, std = (entry_of_header(header, key, path) for key in ("arguments", "mean", "std"))
    check_received_backbone(name, arguments, mean, std, path)
    return _with_weights(name, arguments, weights, str(path), mean, std)


def entry_of_header(header: Mapping[str, str], key: str, path: Path) -> Any:
    """Parse a JSON entry; ValueError if it is missing or not JSON."""
    try:
        return json.loads(header[key])
    except (KeyError, ValueError, RecursionError):
        raise ValueError(f"The entry {key!r} in the header of {path} is missing or not JSON: export it again") from None


def read_safetensors(path: Path, remedy: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors; ValueError with the remedy if the file is not safetensors or is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file or is damaged ({error}): {remedy}") from None
    if header.get(DIGEST, digest(tensors)) != digest(tensors):
        raise ValueError(f"{path} is damaged, the checksum in its header does not match its tensors: {remedy}")
    return header, tensors


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _rebuilt(name: str, arguments: Mapping[str, Any], file: str) -> nn.Module:
    try:
        return rebuild_backbone(name, **arguments)
    except Exception as error:  # timm and torchvision raise anything for untested arguments
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"The backbone {name!r} of {file} cannot be built: {reason}") from error


def _check_channels(
    network: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None, path: object
) -> None:
    """Refuse statistics with another number of channels than the network."""
    channels = len(pixel_statistics(network)[0])
    for key, numbers in (("mean", mean), ("std", std)):
        if numbers and len(numbers) != channels:
            raise ValueError(
                f"{path} has {len(numbers)} numbers as {key}, and its backbone takes {channels} channels: the file was "
                "changed, give another."
            )


def _read_weights(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return read_safetensors(path, "fetch it again")[1]
    content = load_plain(path, "a file of weights", ("pass one that torch.save wrote", "save its state_dict alone"))
    for key in NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(one, Tensor) for one in content.values()):
        raise ValueError(f"{path} contains no weights: pass a dict from names to tensors, as returned by state_dict()")
    return content


def _with_weights(
    name: str,
    arguments: Mapping[str, Any],
    weights: Mapping[str, Any],
    file: str,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Backbone:
    network = _rebuilt(name, arguments, file)
    plain = of_encoder({plain_name(key): value for key, value in weights.items()})
    plain = {key.removeprefix("backbone."): value for key, value in plain.items()}
    own = network.state_dict()
    if not arguments and has_norm_before_pooling(plain, own):
        network = _rebuilt(name, {"fc_norm": False}, file)
        own = network.state_dict()
    plain = {key: value for key, value in plain.items() if key in own or not key.startswith(_CLASSIFIERS)}
    wrong = misfit(network, plain)
    if wrong:
        raise ValueError(
            f"the weights in {file} do not fit the backbone {name!r} ({wrong}): "
            "pass the name of the network they belong to"
        )
    network.load_state_dict(plain)
    _check_channels(network, mean, std, file)
    return Backbone(network, mean, std)


def _numbers(buffer: object) -> list[float] | None:
    return [round(value, 6) for value in buffer.flatten().tolist()] if isinstance(buffer, Tensor) else None


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {str(path)!r}: pass a checkpoint, an exported file, or the name of a backbone"
        )
