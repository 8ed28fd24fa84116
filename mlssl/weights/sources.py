"""Frozen backbones to evaluate: from a Lightning checkpoint, an exported file, or a name with weights or without."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mlssl.backbones import build_backbone, pixel_statistics, rebuild_backbone
from mlssl.export.networks import TIMM_CONFIG, TIMM_WEIGHTS
from mlssl.weights.checkpoints import holds_shards, load_checkpoint, load_plain, misfit, open_checkpoint

_PREFIXES = ("_orig_mod.", "module.", "backbone.")
_NESTED = ("state_dict", "model")
_CLASSIFIERS = ("fc.", "head.", "heads.", "classifier.")


class FrozenBackbone(nn.Module):
    """A backbone in eval mode and without gradients, with the pixel statistics that it was trained with.

    Args:
        backbone: From normalised images to features (n, D).
        mean: One number a channel, in 0–1.
        std: Likewise, above 0.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, backbone: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(std).view(1, -1, 1, 1))

    def normalize(self, images: Tensor) -> Tensor:
        """Images uint8 (n, C, H, W) to floats normalised by mean and std."""
        pixels = (images.float() / 255 - self.pixel_mean) / self.pixel_std
        return pixels.contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 (n, C, H, W) to features (n, D)."""
        features: Tensor = self.backbone(self.normalize(images))
        return features


def open_backbone(source: str, *, seed: int = 0) -> FrozenBackbone:
    """Open what a user calls a backbone; no weights are downloaded, and no code in a file is run.

    ===================================  ==================================================================
    source                               is
    ===================================  ==================================================================
    ``runs/…/last.ckpt``                 a Lightning checkpoint of a `MultiLabelSSLModule`, or FSDP's folder of shards
    ``backbone.safetensors``             a file of `mlssl.export_backbone`, whose header names the backbone, or its
                                         folder of format "timm-dir"
    ``resnet50=weights.pth``             a timm name, or ``torchvision/<name>``, with the weights of a local file
    ``resnet50``                         the same, untrained
    ===================================  ==================================================================

    Weights are loaded strictly, but for those of a classifier, which a backbone has not. Prefixes of `torch.compile`,
    of DDP and of our own module are taken off.

    Args:
        source: As above.
        seed: Of untrained weights; the global random state is left as it was.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: On an unknown name, a file that is no checkpoint, is damaged, holds code, does not name its
            backbone, or whose weights do not fit; missing and unexpected ones are named.
    """
    path = Path(source)
    name, equals, file = source.partition("=")
    if equals and not path.exists():  # checkpoints are called epoch=9-step=700.ckpt
        _check_exists(Path(file))
        return _with_weights(rebuild_backbone(name), _read_weights(Path(file)), file, name)
    if (path / TIMM_CONFIG).is_file():
        path /= TIMM_WEIGHTS
    if path.suffix == ".safetensors":
        _check_exists(path)
        return _exported(path)
    if path.suffix in (".ckpt", ".pth", ".pt", ".bin") or path.is_file() or holds_shards(path):
        if not path.is_dir():
            _check_exists(path)
        return FrozenBackbone(*open_checkpoint(path))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network = build_backbone(source)
        except ValueError:
            if path.is_dir():
                load_checkpoint(path)  # which says what kind of folder it takes
            raise
    return FrozenBackbone(network, *pixel_statistics(network))


def _exported(path: Path) -> FrozenBackbone:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file or is damaged ({error}): export it again") from None
    name = header.get("backbone")
    if name is None or "arguments" not in header:
        raise ValueError(f"{path} does not say which backbone it holds: pass its name too, such as resnet50={path}")
    network = rebuild_backbone(name, **json.loads(header["arguments"]))
    return _with_weights(network, weights, str(path), name, json.loads(header["mean"]), json.loads(header["std"]))


def _read_weights(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file or is damaged ({error}): fetch it again") from None
    content = load_plain(path, "a file of weights", ("pass one that torch.save wrote", "save its state_dict alone"))
    for key in _NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(one, Tensor) for one in content.values()):
        raise ValueError(f"{path} holds no weights: pass a dict from names to tensors, as state_dict() gives it")
    return content


def _with_weights(
    network: nn.Module,
    weights: dict[str, Any],
    file: str,
    name: str,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> FrozenBackbone:
    plain = {_plain_name(key): value for key, value in weights.items()}
    own = network.state_dict()
    plain = {key: value for key, value in plain.items() if key in own or not key.startswith(_CLASSIFIERS)}
    wrong = misfit(network, plain)
    if wrong:
        raise ValueError(
            f"the weights in {file} do not fit the backbone {name!r} ({wrong}): "
            "pass the name of the network that they were saved from"
        )
    network.load_state_dict(plain)
    own_mean, own_std = pixel_statistics(network)
    return FrozenBackbone(network, mean or own_mean, std or own_std)


def _plain_name(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {str(path)!r}: pass a checkpoint, an exported file, or the name of a backbone"
        )
