"""Export a backbone: write it, reload it with its target library, compare features, then give the file its name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlssl.atomic import files_written_aside
from mlssl.backbones import TORCHVISION_PREFIX, check_image_size, image_shape, takes_other_sizes
from mlssl.export.card import CARD
from mlssl.export.detectron2 import load_detectron2, write_detectron2
from mlssl.export.networks import (
    load_own,
    load_timm,
    load_timm_folder,
    load_torchvision,
    same_weights,
    write_safetensors,
    write_state_dict,
    write_timm_folder,
)
from mlssl.export.onnx import load_onnx, write_onnx
from mlssl.export.program import load_program, write_program
from mlssl.weights.sources import TIMM_CONFIG, TIMM_WEIGHTS, Backbone, open_network

MAX_RELATIVE_DIFFERENCE = 1e-4
"""Maximum difference of an exported network's features, as a fraction of the largest feature.

Float32 rounding alone reaches 1e-5: the order of a sum depends on memory alignment.
"""

EXPORT_SUFFIXES = {
    "timm": (".safetensors",),
    "torchvision": (".pth", ".pt"),
    "safetensors": (".safetensors",),
    "timm-dir": ("",),
    "detectron2": (".pkl",),
    "onnx": (".onnx",),
    "torch.export": (".pt2",),
}
"""The formats and their file suffixes; "" for a folder."""


class ExportReport(NamedTuple):
    """Path, format and check of an export; path-like, so `open` and `pathlib.Path` accept it."""

    path: Path
    format: str
    max_difference: float
    """Largest difference from the source's features, as a fraction of the largest feature."""
    check: str
    """Python code that loads the file into `network`, as used for the comparison."""

    def __fspath__(self) -> str:
        return str(self.path)


def export_backbone(
    source: str | os.PathLike[str] | nn.Module,
    path: str | os.PathLike[str],
    format: str | None = "timm",
    network: str = "backbone",
    *,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    fixed_size: bool = False,
) -> ExportReport:
    """Export the backbone, without projector and predictor, and verify that it has the same features.

    The file is written under a temporary name and loaded strictly with its target library; its features of random
    images, of two sizes if the network allows, are compared with the source's (float32, eval mode, NCHW, CPU). Only
    then does it get its name: a file is complete and correct, or absent. The source and all random states stay
    unchanged.

    ============ ========================  =====================================================================
    format       file                      loads with
    ============ ========================  =====================================================================
    timm         .safetensors              `timm.create_model(name, num_classes=0, checkpoint_path=path)`
    timm-dir     a folder, config.json,    `timm.create_model("local-dir:path", pretrained=True, num_classes=0)`, or
                 model.safetensors and     `num_classes=5` for a new head of five classes
                 README.md
    torchvision  .pth, a dict of tensors   `load_state_dict` once the classifier is `nn.Identity()`
    detectron2   .pkl, next to it          `MODEL.WEIGHTS`; without Detectron2 the weights are checked in a ResNet
                 configs, head, README     of torchvision that is rebuilt from their names
    safetensors  .safetensors              `load_state_dict(safetensors.torch.load_file(path))`, for any network
    onnx         .onnx                     `onnxruntime.InferenceSession(path)`, for any network that torch exports
    torch.export .pt2                      `torch.export.load(path).module()`, likewise
    ============ ========================  =====================================================================

    A transformer that averages its patch tokens, like ours, needs `global_pool="avg"` in timm's call; the report's
    `check` is the full call. A timm folder contains the setting, but without `pretrained=True` timm silently keeps
    random weights. An ONNX or torch.export graph accepts any number of images, and any size if the network does and
    `fixed_size` is False.

    Args:
        source: A Lightning checkpoint of a `MultiLabelSSLModule` (any precision, DDP, torch.compile, or an FSDP shard
            folder), such a module, or a backbone.
        path: File to write, or folder for timm-dir; missing folders are created.
        format: A format in the table; None for the first one with the path's suffix that supports the backbone
            (torchvision first for a `torchvision/<name>`).
        network: Name of the submodule to export, the backbone or another with its architecture, such as "teacher".
        overwrite: Whether existing files may be replaced; others in the same folder stay.
        metadata: Header entries in addition to the standard ones: library version, backbone, its arguments, mean, std
            and feature width, and from a checkpoint or a fit the steps, the settings of model and data, and the
            metrics. "license", a Hugging Face Hub identifier such as "cc0-1.0", goes into the model card. Torchvision's
            format has no header.
        image_size: Height and width, or one side, of the images for the comparison; by default the smallest that the
            network accepts.
        fixed_size: Whether a graph only accepts images of `image_size`, as some runtimes require.

    Raises:
        FileExistsError: A file to write exists and `overwrite` is False.
        FileNotFoundError: There is no checkpoint at `source`.
        ValueError: The format is unknown, does not match the suffix or does not support the architecture; the source
            has no such network; a checkpoint contains pickled code; the network does not accept the image size; or
            features differ after loading.
        ModuleNotFoundError: Packages of the extra "onnx" are needed and missing.
        OSError: The file cannot be written; an existing file at `path` stays intact.
    """
    path = Path(path)
    check_format(format)
    _check_file_name(path, format, metadata)
    _check_free(path, format, overwrite)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        opened = open_network(source, network).plain_copy()
        format = _fitting_format(opened, format, path.suffix)
        traced = _FORMATS[format].traced
        if fixed_size and not traced:
            raise ValueError(
                f"fixed_size was given, and format {format!r} contains weights, which have no image size: leave it "
                "out, or choose 'onnx' or 'torch.export'."
            )
        batches = _random_images(opened.backbone, image_size, other_sizes=not fixed_size)
        expected = [opened.backbone(images) for images in batches]
        header = file_header(opened, expected[0].shape[1]) | dict(metadata or {})
        is_folder = format == "timm-dir"
        with files_written_aside(path if is_folder else path.parent, overwrite=overwrite) as aside:
            staged = aside if is_folder else aside / path.name
            try:
                settings = {"images": batches[0], "any_size": len(batches) > 1} if traced else {}
                _FORMATS[format].write(opened, staged, header, **settings)
            except OSError as error:
                if error.filename is None:  # a full disk is reported so
                    error.filename = str(path)
                raise
            loaded, check = _FORMATS[format].load(opened, staged)
            loaded.eval()
            difference = max(_difference(loaded(images), one) for images, one in zip(batches, expected, strict=True))
            if not difference <= MAX_RELATIVE_DIFFERENCE:
                raise ValueError(
                    f"The features of the {format!r} export differ by {difference:.1e} of the largest one, above the "
                    f"maximum of {MAX_RELATIVE_DIFFERENCE:.0e}, and the file was not kept: check the weights for NaN, "
                    "or export as 'safetensors' and load them into the original network."
                )
    return ExportReport(path, format, difference, check.replace(str(staged), str(path)))


def fitting_format(module: nn.Module, format: str | None = None, network: str = "backbone") -> str:
    """The format if it supports the backbone, or for None the best one that does; writes nothing.

    Args:
        module: A `MultiLabelSSLModule` or a backbone.
        format: See :func:`export_backbone`.
        network: See :func:`export_backbone`.

    Raises:
        ValueError: The format is unknown or does not support the backbone.
    """
    check_format(format)
    with torch.random.fork_rng(devices=[]):
        return _fitting_format(open_network(module, network), format)


def check_format(format: str | None) -> None:
    """Refuse an unknown format.

    Raises:
        ValueError: Names the known ones.
    """
    if format is not None and format not in EXPORT_SUFFIXES:
        raise ValueError(f"Unknown export format {format!r}: choose {', '.join(map(repr, EXPORT_SUFFIXES))}.")


# ---------------------------------------------------------------------- formats


class _Format(NamedTuple):
    write: Callable[..., None]
    """Takes source, path and header, and for a graph the images to trace and whether sizes may vary."""
    load: Callable[[Backbone, Path | None], tuple[nn.Module, str]]
    """Builds the network with the format's library, loads the file strictly if given, and returns the code."""
    traced: bool = False
    """Whether the format is a graph."""


_FORMATS = {
    "timm": _Format(write_safetensors, load_timm),
    "torchvision": _Format(write_state_dict, load_torchvision),
    "safetensors": _Format(write_safetensors, load_own),
    "timm-dir": _Format(write_timm_folder, load_timm_folder),
    "detectron2": _Format(write_detectron2, load_detectron2),
    "onnx": _Format(write_onnx, load_onnx, traced=True),
    "torch.export": _Format(write_program, load_program, traced=True),
}
_BUILT_BY_NAME = ("timm", "torchvision", "timm-dir")


def _fitting_format(source: Backbone, format: str | None, suffix: str | None = None) -> str:
    candidates = [format] if format else [one for one, ends in EXPORT_SUFFIXES.items() if suffix in (None, *ends)]
    if (source.name or "").startswith(TORCHVISION_PREFIX):
        candidates.sort(key="torchvision".__ne__)
    obstacles = []
    for candidate in candidates:
        obstacle = _obstacle(source, candidate)
        if obstacle is None:
            return candidate
        obstacles.append(f"format {candidate!r} does not support it: {obstacle}")
    given = "This network" if source.name is None else f"The backbone {source.name!r}"
    holding = [repr(other) for other in _FORMATS if _FORMATS[other].traced or _obstacle(source, other) is None]
    raise ValueError(
        f"{given} cannot be exported, {'; '.join(obstacles)}. Formats that support it: {', '.join(holding)}."
    )


def _obstacle(source: Backbone, format: str) -> str | None:
    """Why the format's library cannot build a network with the same weight names and shapes; None if it can."""
    if source.name is None and format in _BUILT_BY_NAME:
        return "it was not built by name"
    try:
        network, _ = _FORMATS[format].load(source, None)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{format} does not build it ({error})"
    return None if same_weights(source, network) else f"{format} builds it with other weight names or shapes"


# ---------------------------------------------------------------------- files


def _check_file_name(path: Path, format: str | None, metadata: Mapping[str, str] | None) -> None:
    of_files = [suffix for suffixes in EXPORT_SUFFIXES.values() for suffix in suffixes if suffix]
    if format == "timm-dir":
        if path.suffix in of_files:
            raise ValueError(f"{path} has a file suffix, and format 'timm-dir' is a folder: leave {path.suffix} out.")
    elif path.suffix not in (suffixes := EXPORT_SUFFIXES[format] if format else tuple(dict.fromkeys(of_files))):
        raise ValueError(f"{path} does not end in {' or '.join(suffixes)}, which selects the format: rename it.")
    if metadata and path.suffix in EXPORT_SUFFIXES["torchvision"]:
        raise ValueError(f"{path} can only contain tensors: leave metadata out, or write a .safetensors file.")


def _check_free(path: Path, format: str | None, overwrite: bool) -> None:
    files = (
        [path / TIMM_CONFIG, path / TIMM_WEIGHTS, path / CARD]
        if format == "timm-dir" and not path.is_file()
        else [path]
    )
    for file in files:
        if file.exists() and not (overwrite and file.is_file()):
            raise FileExistsError(
                f"{file} exists: choose another name, or pass overwrite=True (--overwrite true) to replace it."
            )


def _random_images(network: nn.Module, image_size: int | tuple[int, int] | None, *, other_sizes: bool) -> list[Tensor]:
    """Two images of one size, and one of another if requested and supported."""
    shape = image_shape(network)
    if image_size is not None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        check_image_size(network, height, width)
        shape = (shape[0], height, width)
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(2, *shape, generator=generator)]
    if other_sizes and takes_other_sizes(network, shape):
        channels, height, width = shape
        images.append(torch.rand(1, channels, 2 * height, 3 * width, generator=generator))
    return images


def file_header(source: Backbone, width: int) -> dict[str, str]:
    """What the header of an exported file says of a backbone whose features are `width` wide."""
    return {
        "library": f"mlssl {_library_version()}",
        "backbone": source.name or type(source.backbone).__name__,
        "arguments": json.dumps(source.arguments, default=repr),
        "mean": json.dumps(source.mean),
        "std": json.dumps(source.std),
        "features": str(width),
        **source.history,
    }


def _library_version() -> str:
    try:
        return version("mlssl")
    except PackageNotFoundError:  # run from a checkout without installation
        return "unknown"


def _difference(features: Tensor, expected: Tensor) -> float:
    """Largest difference as a fraction of the largest feature; 0 if all features are 0."""
    largest = expected.abs().max().item()
    difference = (features - expected).abs().max().item()
    return difference / largest if largest else difference
