"""Detectron2 export: weights under its names, configs, and the head and script to train with them.

Names as in Detectron2's documentation and `BasicStem`, `BasicBlock`, `BottleneckBlock` of its `ResNet`: `stem.conv1`,
`res2.0.conv1`, …, `res5.2.conv3`, each with `weight` and `norm.{weight,bias,running_mean,running_var}`; `shortcut` in
blocks that change the width.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlssl.export.networks import tensors_of
from mlssl.weights.sources import Backbone

_BLOCKS: dict[tuple[object, ...], int] = {
    ("basic", 2, 2, 2, 2): 18,
    ("basic", 3, 4, 6, 3): 34,
    ("bottleneck", 3, 4, 6, 3): 50,
    ("bottleneck", 3, 4, 23, 3): 101,
    ("bottleneck", 3, 8, 36, 3): 152,
}
"""Kind and number of blocks per stage → depth for `build_resnet_backbone`."""

_SUPPORTED = (
    "Detectron2 supports ResNet-18, 34, 50, 101 and 152, ResNeXt and wide ResNets of torchvision and timm, with three "
    "channels"
)


class _Settings(NamedTuple):
    """MODEL.RESNETS of a config."""

    depth: int
    num_groups: int
    width_per_group: int
    res2_out_channels: int

    @property
    def has_bottlenecks(self) -> bool:
        return self.depth >= 50


def write_detectron2(source: Backbone, path: Path, header: Mapping[str, str]) -> None:
    """Weights as a pickle of numpy arrays, with configs, head, training script and README next to it."""
    weights = {
        _to_detectron2(name): value.numpy()
        for name, value in tensors_of(source.backbone).items()
        if not name.endswith("num_batches_tracked")
    }
    content = {"model": weights, "__author__": header["library"], "matching_heuristics": True, "mlssl": dict(header)}
    path.write_bytes(pickle.dumps(content, protocol=4))
    _write_companions(source, path, header)


def load_detectron2(source: Backbone, path: Path | None) -> tuple[nn.Module, str]:
    """The file's weights in Detectron2's network if installed, else in torchvision's; and the code."""
    if path is None:
        names = {_to_detectron2(name): value for name, value in source.backbone.state_dict().items()}
        return _torchvision_network(names), ""
    if find_spec("detectron2") is not None:
        return _detectron2_network(path), "Detectron2's build_resnet_backbone and load_state_dict"
    return torchvision_resnet(path), f"network = mlssl.export.detectron2.torchvision_resnet({str(path)!r})"


def torchvision_resnet(path: Path | str) -> nn.Module:
    """A torchvision ResNet, its classifier the identity, with the weights of a file in Detectron2's naming.

    Number and kind of blocks, groups and widths are derived from the names and shapes in the file, and every weight
    must match: this verifies names, shapes and values without Detectron2. Open only your own files: a pickle can run
    code.

    Args:
        path: Written by :func:`mlssl.export_backbone` with format "detectron2".

    Raises:
        ValueError: The names are not those of a ResNet that Detectron2 can build.
    """
    weights = _weights(Path(path))
    network = _torchvision_network(weights)
    network.load_state_dict({_from_detectron2(name): value for name, value in weights.items()})
    return network.eval()


# ---------------------------------------------------------------------- names

_TO_DETECTRON2 = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^layer(\d)\.", lambda found: f"res{int(found[1]) + 1}."),
    (r"\bbn(\d)\.", r"conv\1.norm."),
    (r"\bdownsample\.0\.", "shortcut."),
    (r"\bdownsample\.1\.", "shortcut.norm."),
)
_FROM_DETECTRON2 = (
    (r"^stem\.", ""),
    (r"^res(\d)\.", lambda found: f"layer{int(found[1]) - 1}."),
    (r"\bconv(\d)\.norm\.", r"bn\1."),
    (r"\bshortcut\.norm\.", "downsample.1."),
    (r"\bshortcut\.", "downsample.0."),
)
_WELL_FORMED = re.compile(
    r"(stem\.conv1|res[2-5]\.\d+\.(conv[123]|shortcut))"
    r"\.(weight|norm\.(weight|bias|running_mean|running_var|num_batches_tracked))"
)


def _to_detectron2(name: str) -> str:
    renamed = _renamed(name, _TO_DETECTRON2)
    if not _WELL_FORMED.fullmatch(renamed):
        raise ValueError(f"{name!r} has no counterpart: {_SUPPORTED}")
    return renamed


def _from_detectron2(name: str) -> str:
    return _renamed(name, _FROM_DETECTRON2)


def _renamed(name: str, rules: Any) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _settings(weights: Mapping[str, Tensor]) -> _Settings:
    """Derive the settings from names and shapes."""
    kind = "bottleneck" if "res2.0.conv3.weight" in weights else "basic"
    matches = (re.match(r"res([2-5])\.(\d+)\.", name) for name in weights)
    last = dict.fromkeys("2345", -1)
    for match in filter(None, matches):
        last[match[1]] = max(last[match[1]], int(match[2]))
    depth = _BLOCKS.get((kind, *(number + 1 for number in last.values())))
    stem = weights.get("stem.conv1.weight", torch.empty(0))
    if depth is None or stem.shape != (64, 3, 7, 7):
        raise ValueError(_SUPPORTED)
    middle = weights["res2.0.conv2.weight"]
    groups = weights["res2.0.conv1.weight"].shape[0] // middle.shape[1]
    out = weights["res2.0.conv3.weight" if kind == "bottleneck" else "res2.0.conv2.weight"].shape[0]
    return _Settings(depth, groups, middle.shape[0] // groups, out)


# ---------------------------------------------------------------------- networks


def _weights(path: Path) -> dict[str, Tensor]:
    content = pickle.loads(path.read_bytes())
    return {name: torch.from_numpy(value) for name, value in content["model"].items()}


def _torchvision_network(weights: Mapping[str, Tensor]) -> nn.Module:
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    settings = _settings(weights)
    layers = next(list(blocks) for (_, *blocks), depth in _BLOCKS.items() if depth == settings.depth)
    block = Bottleneck if settings.has_bottlenecks else BasicBlock
    network: nn.Module = ResNet(block, layers, groups=settings.num_groups, width_per_group=settings.width_per_group)
    network.fc = nn.Identity()
    return network


def _detectron2_network(path: Path) -> nn.Module:
    with warnings.catch_warnings():  # Detectron2 0.6 uses torch.cuda.amp, which is deprecated
        warnings.simplefilter("ignore", FutureWarning)
        from detectron2.config import get_cfg
        from detectron2.layers import ShapeSpec
        from detectron2.modeling.backbone import build_resnet_backbone

    weights = _weights(path)
    config = get_cfg()
    given = {f"MODEL.RESNETS.{name.upper()}": value for name, value in _settings(weights)._asdict().items()}
    given |= {"MODEL.RESNETS.STRIDE_IN_1X1": False, "MODEL.RESNETS.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 0}
    given |= {"MODEL.RESNETS.OUT_FEATURES": ["res5"]}
    config.merge_from_list([word for pair in given.items() for word in pair])
    network = build_resnet_backbone(config, ShapeSpec(channels=3))
    network.load_state_dict(weights)
    return _Pooled(network)


class _Pooled(nn.Module):
    """Features (n, D) of a network that returns named maps."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images)["res5"].mean((2, 3))
        return features


# ---------------------------------------------------------------------- files next to the weights


def _write_companions(source: Backbone, path: Path, header: Mapping[str, str]) -> None:
    """R-CNN C4, the usual comparison of backbones; FPN for basic blocks, for which Detectron2 has no C4 head."""
    settings = _settings({_to_detectron2(name): value for name, value in source.backbone.state_dict().items()})
    mean, std = ([round(255 * value, 4) for value in values] for values in (source.mean, source.std))
    kind = "c4" if settings.has_bottlenecks else "fpn"
    filled = settings._asdict() | {
        "weights": path.name,
        "stem": path.stem,
        "kind": kind.upper(),
        "pixel_mean": mean,
        "pixel_std": std,
        "backbone": header["backbone"],
        "library": header["library"],
    }
    texts = {
        f"{path.stem}_voc.yaml": (f"{kind}.yaml", "voc.yaml"),
        f"{path.stem}_coco.yaml": (f"{kind}.yaml", "coco.yaml"),
        f"{path.stem}_README.md": ("README.md",),
        "train_detectron2.py": ("train_detectron2.py.txt",),
        "res5_extra_norm.py": ("res5_extra_norm.py.txt",),
    }
    for name, parts in texts.items():
        filled |= {"mask_on": "coco" in name, "num_classes": 80 if "coco" in name else 20}
        text = "".join((files("mlssl.export") / "detectron2_files" / part).read_text() for part in parts)
        (path.parent / name).write_text(text if name.endswith(".py") else Template(text).substitute(filled))
