"""The pre-trained backbone leaves: written, loaded again by the library it is for, and compared before it counts."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mlssl.atomic import written_aside
from mlssl.backbones import TORCHVISION_PREFIX, built_as, image_shape, pixel_statistics, rebuild_backbone

MAX_RELATIVE_DIFFERENCE = 1e-5
"""Largest difference of an exported network's features that is let through, as a fraction of the largest feature."""

EXPORT_SUFFIXES = {"timm": (".safetensors",), "torchvision": (".pth", ".pt"), "safetensors": (".safetensors",)}
"""The formats, with the suffixes that a file of each may have."""


class ExportReport(NamedTuple):
    """What was written, and how it was checked; `open`, `pathlib.Path` and the like take it for its path."""

    path: Path
    format: str
    max_difference: float
    """Largest difference from the source's features, as a fraction of the largest feature."""
    check: str
    """Lines of Python that load the file into `network`, as was done for the comparison."""

    def __fspath__(self) -> str:
        return str(self.path)


def export_backbone(
    source: str | os.PathLike[str] | nn.Module,
    path: str | os.PathLike[str],
    format: str | None = "timm",
    *,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> ExportReport:
    """Write the backbone alone, without projector and predictor, and prove that it gives the same features.

    The file is written aside and loaded strictly by the library it is for; its features of random images are compared
    with the source's (float32, eval mode, NCHW, CPU). Only then does it get its name: a file is whole and right, or
    not there. The source keeps its weights, training flags, device and precision, and no random state moves.

    ===========  ========================  =====================================================================
    format       file                      loads with
    ===========  ========================  =====================================================================
    timm         .safetensors              `timm.create_model(name, num_classes=0, checkpoint_path=path)`
    torchvision  .pth, a dict of tensors   `load_state_dict` once the classifier is `nn.Identity()`
    safetensors  .safetensors              `load_state_dict(safetensors.torch.load_file(path))`, for any network
    ===========  ========================  =====================================================================

    A transformer that averages its patch tokens, as ours do, needs the same `global_pool="avg"` in timm's call;
    `check` of the report is the call with all arguments.

    Args:
        source: A Lightning checkpoint of a `MultiLabelSSLModule`, such a module, or a backbone.
        path: File to write; missing folders are made.
        format: One of the table; None takes the first with the path's suffix that can hold the backbone (torchvision
            first for a `torchvision/<name>`).
        overwrite: Whether an existing file may be replaced.
        metadata: Entries of a .safetensors file's header, beside those always there: library version, backbone, its
            arguments, mean, std and feature width.

    Raises:
        FileExistsError: If `path` exists and `overwrite` is False.
        FileNotFoundError: If no checkpoint stands at `source`.
        ValueError: On an unknown format, a suffix that does not fit it, a format that cannot hold the architecture, a
            checkpoint that holds no backbone or pickled code, or features that differ after loading.
        OSError: If the file cannot be written; one that stood at `path` is whole then.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another name, or pass overwrite=True to replace it.")
    check_format(format)
    _check_file_name(path, format, metadata)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        backbone = _plain_copy(_open(source))
        format = _fitting_format(backbone, format, path.suffix)
        images = torch.rand(2, *image_shape(backbone.network), generator=torch.Generator().manual_seed(0))
        expected = backbone.network(images)
        header = _header(backbone, expected.shape[1]) | dict(metadata or {})
        with written_aside(path) as aside:
            _write(backbone.network, aside, header)
            loaded, check = _LOADERS[format](backbone, aside)
            difference = _difference(loaded.eval()(images), expected)
            if not difference <= MAX_RELATIVE_DIFFERENCE:
                raise ValueError(
                    f"The {format!r} export gives features that differ by {difference:.1e} of the largest one, at most "
                    f"{MAX_RELATIVE_DIFFERENCE:.0e} is allowed, and was not kept: check the weights for NaN, or export "
                    "as 'safetensors' and load them into the network they come from."
                )
    return ExportReport(path, format, difference, check.replace(repr(str(aside)), repr(str(path))))


def fitting_format(network: nn.Module, format: str | None = None) -> str:
    """The format itself where it can hold the backbone, and for None the best one that can; nothing is written.

    Args:
        network: A `MultiLabelSSLModule` or a backbone.
        format: As for :func:`export_backbone`.

    Raises:
        ValueError: On an unknown format, or one that cannot hold the backbone.
    """
    check_format(format)
    with torch.random.fork_rng(devices=[]):
        return _fitting_format(_open(network), format)


def check_format(format: str | None) -> None:
    """Refuse a format that is not known.

    Raises:
        ValueError: Naming the known ones.
    """
    if format is not None and format not in EXPORT_SUFFIXES:
        raise ValueError(f"Unknown export format {format!r}: choose {', '.join(map(repr, EXPORT_SUFFIXES))}.")


def misfit(network: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """What keeps a network from taking weights of these names and shapes, some of them named; "" for nothing."""
    own = network.state_dict()
    faults = {
        # Files from before torch 0.4.1 have no such counters, and load_state_dict does without.
        "missing": sorted(name for name in own.keys() - weights.keys() if not name.endswith("num_batches_tracked")),
        "unexpected": sorted(weights.keys() - own.keys()),
        "of another shape": sorted(
            name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape
        ),
    }
    return "; ".join(
        f"{len(names)} {fault}, {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for fault, names in faults.items()
        if names
    )


def open_checkpoint(path: str | os.PathLike[str]) -> tuple[nn.Module, Sequence[float], Sequence[float]]:
    """Backbone of a Lightning checkpoint with its weights, and mean and standard deviation of its pixels.

    Args:
        path: Of a checkpoint of a `MultiLabelSSLModule` whose backbone was given by name.

    Raises:
        FileNotFoundError: If no checkpoint stands there.
        ValueError: If it is none, is damaged, holds pickled code or no backbone, or its weights do not fit the backbone
            that it names.
    """
    opened = _open_checkpoint(Path(path))
    return opened.network, *opened.statistics


class _Backbone(NamedTuple):
    network: nn.Module
    name: str | None
    """As `build_backbone` takes it; None for a network of the user's own."""
    arguments: dict[str, Any]
    statistics: tuple[Sequence[float], Sequence[float]]
    """Mean and standard deviation of the pixels that it was trained on."""


# ---------------------------------------------------------------------- sources


def _open(source: str | os.PathLike[str] | nn.Module) -> _Backbone:
    if not isinstance(source, nn.Module):
        return _open_checkpoint(Path(source))
    inner = getattr(source, "backbone", None)
    if not isinstance(inner, nn.Module):
        return _named(source)
    return _named(inner, _numbers(getattr(source, "pixel_mean", None)), _numbers(getattr(source, "pixel_std", None)))


def _named(network: nn.Module, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> _Backbone:
    network = getattr(network, "_orig_mod", network)  # under torch.compile
    own_mean, own_std = pixel_statistics(network)
    # A timm network that was built elsewhere carries its name, and is taken to have no arguments until compared.
    config = getattr(network, "pretrained_cfg", None) or {}
    name, arguments = built_as(network) or (config.get("architecture"), {})
    return _Backbone(network, name, arguments, (mean or own_mean, std or own_std))


def _numbers(buffer: object) -> list[float] | None:
    return [round(value, 6) for value in buffer.flatten().tolist()] if isinstance(buffer, Tensor) else None


def _open_checkpoint(path: Path) -> _Backbone:
    checkpoint = _load_plain(path)
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    weights = {}
    for name, value in (state or {}).items():
        plain = name.replace("_orig_mod.", "").removeprefix("module.")  # of torch.compile and of DDP
        if plain.startswith("backbone."):
            weights[plain.removeprefix("backbone.")] = value
    if not weights:
        raise ValueError(
            f"{path} holds no backbone, its state_dict has no 'backbone.…' entries: "
            "give a checkpoint that the Trainer saved of a MultiLabelSSLModule."
        )
    settings = checkpoint.get("hyper_parameters", {})
    if not isinstance(settings.get("backbone"), str):
        raise ValueError(
            f"The hyper-parameters in {path} do not name the backbone, which was given as a network or by a subclass: "
            "load the module, MultiLabelSSLModule.load_from_checkpoint(path, backbone=net), and export that."
        )
    network = rebuild_backbone(settings["backbone"], **(settings.get("backbone_kwargs") or {}))
    wrong = misfit(network, weights)
    if wrong:
        raise ValueError(f"The weights in {path} do not fit its backbone {settings['backbone']!r}: {wrong}.")
    network.load_state_dict(weights)
    return _named(network, settings.get("mean"), settings.get("std"))


def _load_plain(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint stands at {path}: give the path of a .ckpt file that exists.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # foreign bytes make the unpickler raise almost anything
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
            raise ValueError(
                f"{path} holds pickled Python objects, which could run any code when opened, and was refused: "
                f"train with hyper-parameters that are plain values. {error}"
            ) from None
        raise ValueError(f"{path} is not a checkpoint or is damaged: give a .ckpt that the Trainer saved.") from None


def _plain_copy(backbone: _Backbone) -> _Backbone:
    network = copy.deepcopy(backbone.network).to("cpu", torch.float32, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return backbone._replace(network=network.eval())


# ---------------------------------------------------------------------- formats


def _fitting_format(backbone: _Backbone, format: str | None, suffix: str | None = None) -> str:
    candidates = [format] if format else [one for one, ends in EXPORT_SUFFIXES.items() if suffix in (None, *ends)]
    if (backbone.name or "").startswith(TORCHVISION_PREFIX):
        candidates.sort(key="torchvision".__ne__)
    obstacles = []
    for candidate in candidates:
        obstacle = _obstacle(backbone, candidate)
        if obstacle is None:
            return candidate
        obstacles.append(f"format {candidate!r} cannot hold it: {obstacle}")
    given = "This network" if backbone.name is None else f"The backbone {backbone.name!r}"
    raise ValueError(
        f"{given} cannot be exported, {'; '.join(obstacles)}. Choose 'safetensors', which holds any network."
    )


def _obstacle(backbone: _Backbone, format: str) -> str | None:
    """Why the format's library does not build a network with weights of the same names and shapes; None if it does."""
    if backbone.name is None and format != "safetensors":
        return "it was not built by name"
    try:
        network, _ = _LOADERS[format](backbone, None)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{format} does not build it ({error})"
    own, built = (
        {name: value.shape for name, value in one.state_dict().items()} for one in (backbone.network, network)
    )
    return None if own == built else f"{format} builds it with weights of other names or shapes"


def _load_timm(backbone: _Backbone, file: Path | None) -> tuple[nn.Module, str]:
    import timm

    name = _bare_name(backbone)
    network = timm.create_model(name, num_classes=0, checkpoint_path=str(file or ""), **backbone.arguments)
    arguments = _spelled(backbone.arguments)
    return network, f"network = timm.create_model({name!r}, num_classes=0, checkpoint_path={str(file)!r}{arguments})"


def _load_torchvision(backbone: _Backbone, file: Path | None) -> tuple[nn.Module, str]:
    from torchvision import models

    name = _bare_name(backbone).partition(".")[0]  # without timm's tag of the weights
    network: nn.Module = models.get_model(name, **backbone.arguments)
    classifier = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)][-1]
    network.set_submodule(classifier, nn.Identity())
    if file is not None:
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network, (
        f"network = torchvision.models.get_model({name!r}{_spelled(backbone.arguments)})\n"
        f"network.set_submodule({classifier!r}, torch.nn.Identity())\n"
        f"network.load_state_dict(torch.load({str(file)!r}, weights_only=True))"
    )


def _load_own(backbone: _Backbone, file: Path | None) -> tuple[nn.Module, str]:
    network = copy.deepcopy(backbone.network)
    if file is not None:
        network.load_state_dict(load_file(file))
    return network, f"network.load_state_dict(safetensors.torch.load_file({str(file)!r}))"


_LOADERS: dict[str, Callable[[_Backbone, Path | None], tuple[nn.Module, str]]] = {
    "timm": _load_timm,
    "torchvision": _load_torchvision,
    "safetensors": _load_own,
}
"""Each builds the network by the library of its format, loads the file strictly where there is one, and tells how."""


def _bare_name(backbone: _Backbone) -> str:
    return (backbone.name or "").removeprefix(TORCHVISION_PREFIX)


def _spelled(arguments: dict[str, Any]) -> str:
    return "".join(f", {name}={value!r}" for name, value in arguments.items())


# ---------------------------------------------------------------------- files


def _check_file_name(path: Path, format: str | None, metadata: Mapping[str, str] | None) -> None:
    suffixes = EXPORT_SUFFIXES[format] if format else (".safetensors", ".pth", ".pt")
    if path.suffix not in suffixes:
        raise ValueError(f"{path} does not end in {' or '.join(suffixes)}, by which its format is known: rename it.")
    if metadata and path.suffix != ".safetensors":
        raise ValueError(f"{path} will hold tensors alone: leave metadata out, or write a .safetensors file.")


def _header(backbone: _Backbone, width: int) -> dict[str, str]:
    mean, std = backbone.statistics
    return {
        "library": f"mlssl {_library_version()}",
        "backbone": backbone.name or type(backbone.network).__name__,
        "arguments": json.dumps(backbone.arguments, default=repr),
        "mean": json.dumps(mean),
        "std": json.dumps(std),
        "features": str(width),
    }


def _library_version() -> str:
    try:
        return version("mlssl")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def _write(network: nn.Module, file: Path, header: dict[str, str]) -> None:
    # Cloned, because safetensors takes no two names for one tensor.
    tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in network.state_dict().items()}
    if file.suffix == ".safetensors":
        file.write_bytes(save(tensors, header))
    else:
        buffer = io.BytesIO()  # written by Python, because torch does not say that a disk is full
        torch.save(tensors, buffer)
        file.write_bytes(buffer.getbuffer())


def _difference(features: Tensor, expected: Tensor) -> float:
    """Largest difference as a fraction of the largest feature; 0 for features that are all 0 on both sides."""
    largest = expected.abs().max().item()
    difference = (features - expected).abs().max().item()
    return difference / largest if largest else difference
