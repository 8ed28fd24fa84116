"""The pre-trained backbone leaves: written, loaded again by the library it is for, and compared before it counts."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mlssl.atomic import written_aside
from mlssl.backbones import TORCHVISION_PREFIX, blank_image, build_backbone, pixel_statistics, rebuild_backbone

MAX_RELATIVE_DIFFERENCE = 1e-5
"""Largest difference of an exported network's features, as a fraction of the largest feature."""

SHARED_RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)
"""Architectures that timm and torchvision name and spell alike, key by key, so that weights go from one to the other."""


class ExportReport(NamedTuple):
    """What was written, and how it was checked; `open`, `pathlib.Path` and the like take it for its path."""

    path: Path
    format: str
    max_difference: float
    """Largest difference from the source's features, as a fraction of the largest feature."""
    check: str
    """The call that loaded the file for the comparison, to be used as it stands."""

    def __fspath__(self) -> str:
        return str(self.path)


def export_backbone(
    source: str | os.PathLike[str] | nn.Module,
    path: str | os.PathLike[str],
    format: str | None = "timm",  # noqa: A002
    *,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> ExportReport:
    """Write the backbone alone, without projector and predictor, and prove that it gives the same features.

    The file is written aside and loaded strictly by the library it is for; its features of random images are compared
    with the source's (float32, eval mode, contiguous, CPU). Only then does it get its name: a file is whole and
    right, or not there. The source keeps its weights, training flags, device and precision, and no random state moves.

    | format | file | loads with |
    |---|---|---|
    | timm | .safetensors | `timm.create_model(name, num_classes=0, checkpoint_path=path)` |
    | torchvision | .pth, a dict of tensors | `load_state_dict` once the classifier is `nn.Identity()` |
    | safetensors | .safetensors with metadata | `safetensors.torch.load_file`, for any module |

    A vision transformer that averages its patch tokens needs `global_pool="avg"` in timm's call too; the report's
    `check` is the call that gave the same features.

    Args:
        source: a Lightning checkpoint, a `MultiLabelSSLModule`, or a backbone. From a checkpoint or module the
            architecture is known by its hyper-parameters; of a bare network only timm's carry their name.
        path: file to write; missing folders are made.
        format: one of the table; None takes the first that can hold the backbone.
        overwrite: whether an existing file may be replaced.
        metadata: further entries beside library version, backbone, arguments, mean, std and feature width; kept in the
            header of .safetensors files.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
        FileNotFoundError: no checkpoint stands at `source`.
        ValueError: an unknown format, a suffix that does not fit it, a format that cannot hold the architecture, a
            checkpoint that holds no backbone or pickled code, or features that differ after loading.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another name or pass overwrite=True")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        backbone = _open(source)
        format = fitting_format(backbone, format)  # noqa: A001
        suffixes = _FORMATS[format].suffixes
        if path.suffix not in suffixes:
            raise ValueError(f"{path} does not end in {' or '.join(suffixes)}, by which format {format!r} is recognised")
        if metadata and ".safetensors" not in suffixes:
            raise ValueError(f"format {format!r} holds tensors alone: leave metadata out, or export as 'safetensors'")
        backbone = backbone._replace(network=_plain_copy(backbone.network))
        with written_aside(path) as aside:
            _FORMATS[format].write(backbone, aside, _described(backbone) | dict(metadata or {}))
            difference, check = _compare(backbone, aside, format)
    return ExportReport(path, format, difference, check.replace("PATH", repr(str(path))))


class NamedBackbone(NamedTuple):
    """A network with what is known of its making."""

    network: nn.Module
    name: str | None
    """As `build_backbone` takes it; None for a network of the user's own."""
    kwargs: dict[str, Any]
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    """Mean and std of the pixels that it was trained on."""


def fitting_format(source: nn.Module | NamedBackbone, format: str | None = None) -> str:  # noqa: A002
    """The format itself where it can hold the backbone, and for None the first one that can.

    Raises:
        ValueError: an unknown format, or one that cannot hold the backbone.
    """
    backbone = source if isinstance(source, NamedBackbone) else _open_module(source)
    check_format(format)
    if format is not None:
        _FORMATS[format].target_name(backbone)
        return format
    if backbone.name is None:
        return "safetensors"
    return "torchvision" if backbone.name.startswith(TORCHVISION_PREFIX) else "timm"


def check_format(format: str | None) -> None:  # noqa: A002
    """Refuse a format that is not known.

    Raises:
        ValueError: names the known ones.
    """
    if format is not None and format not in _FORMATS:
        raise ValueError(f"unknown export format {format!r}: choose {', '.join(map(repr, _FORMATS))}")
