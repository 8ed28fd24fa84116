"""What is exported: a network in float32 on the CPU, with its name, pixel statistics and history, out of any source."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlssl.backbones import built_as, pixel_statistics, rebuild_backbone

# What wrappers put in front of or into the names of weights: torch.compile, FSDP and activation checkpointing.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

_SHARDS = ".metadata"
"""File that names the tensors of a checkpoint which `torch.distributed.checkpoint` wrote, a folder."""

_REST_OF_SHARDS = "meta.pt"
"""File of Lightning beside the shards, with all of a checkpoint but its weights."""

_WEIGHTS = ("model.", "state_dict.")
"""Before the names of weights in shards: the former by FSDP's strategy, the latter by ModelParallel's."""

_PRIVATE_SETTINGS = ("root", "num_workers", "_instantiator")
"""Of the data: they name a machine or Lightning's way to build it, not what was learned from."""


class Backbone(NamedTuple):
    """A network and what is known about it."""

    network: nn.Module
    name: str | None
    """As `build_backbone` takes it; None for a network of the user's own."""
    arguments: dict[str, Any]
    statistics: tuple[Sequence[float], Sequence[float]]
    """Mean and standard deviation of the pixels that it was trained on."""
    history: Mapping[str, str]
    """Steps, data and metrics, as far as the source tells."""


def open_source(source: str | os.PathLike[str] | nn.Module) -> Backbone:
    """The backbone of a checkpoint, of a module that has one as `.backbone`, or the network itself, not copied.

    Raises:
        FileNotFoundError: If no checkpoint stands there.
        ValueError: If it holds no backbone, does not say which, or holds pickled code.
    """
    if not isinstance(source, nn.Module):
        return _open_checkpoint(Path(source))
    source = getattr(source, "module", source) if type(source).__name__ == "DistributedDataParallel" else source
    inner = getattr(source, "backbone", None)
    if not isinstance(inner, nn.Module):
        return _named(source, {})
    mean, std = (_numbers(getattr(source, name, None)) for name in ("pixel_mean", "pixel_std"))
    return _named(inner, _history_of_module(source), mean, std)


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


def load_checkpoint(path: Path) -> Any:
    """What a checkpoint holds: of a file all of it, of FSDP's folder of shards all but the optimizer's state.

    Raises:
        FileNotFoundError: If no checkpoint stands there.
        ValueError: If it is none, is damaged or holds pickled code.
    """
    if not path.is_dir():
        return load_plain(path)
    if not holds_shards(path):
        raise ValueError(
            f"{path} is a folder, and not one of shards, for it has no {_SHARDS}: give the path of a checkpoint, such "
            "as checkpoints/last.ckpt in the folder of a run."
        )
    return _load_shards(path)


def holds_shards(path: Path) -> bool:
    """Whether it is a checkpoint of many files, as FSDP's processes write one by default."""
    return (path / _SHARDS).is_file()


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


def plain_copy(backbone: Backbone) -> Backbone:
    """The same in float32, contiguous, in eval mode, on the CPU; the source stays as it is."""
    network = copy.deepcopy(backbone.network).to("cpu", torch.float32, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return backbone._replace(network=network.eval())


def _named(
    network: nn.Module,
    history: Mapping[str, str],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Backbone:
    network = getattr(network, "_orig_mod", network)  # under torch.compile
    own_mean, own_std = pixel_statistics(network)
    # A timm network that was built elsewhere carries its name, and is taken to have no arguments until compared.
    config = getattr(network, "pretrained_cfg", None) or {}
    name, arguments = built_as(network) or (config.get("architecture"), {})
    return Backbone(network, name, arguments, (mean or own_mean, std or own_std), history)


def _numbers(buffer: object) -> list[float] | None:
    return [round(value, 6) for value in buffer.flatten().tolist()] if isinstance(buffer, Tensor) else None


# ---------------------------------------------------------------------- checkpoints


def _open_checkpoint(path: Path) -> Backbone:
    checkpoint = load_checkpoint(path)
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    weights = {}
    for name, value in (state or {}).items():
        plain = _plain_name(name)
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
    return _named(network, _history_of_checkpoint(checkpoint), settings.get("mean"), settings.get("std"))


def _plain_name(name: str) -> str:
    return _WRAPPERS.sub("", name).removeprefix("module.")  # the last of DDP


def load_plain(
    path: Path,
    kind: str = "a checkpoint",
    remedies: tuple[str, str] = (
        "give a .ckpt that the Trainer saved",
        "train with hyper-parameters that are plain values",
    ),
) -> Any:
    """What a file that torch.save wrote holds, tensors and plain values alone; no code in it is run.

    Args:
        path: The file.
        kind: What it is expected to be, for the message.
        remedies: What to do where it is something else, and where it holds pickled code.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is something else or damaged, or holds pickled code.
    """
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
                f"{remedies[1]}. {error}"
            ) from None
        raise ValueError(f"{path} is not {kind} or is damaged: {remedies[0]}.") from None


def _load_shards(path: Path) -> dict[str, Any]:
    """Weights, and all that is no tensor, of a checkpoint that FSDP wrote in shards."""
    from torch.distributed.checkpoint.state_dict_loader import load

    rest: dict[str, Any] = load_plain(path / _REST_OF_SHARDS)
    try:
        with (path / _SHARDS).open("rb") as file:
            tensors = _HarmlessUnpickler(file).load().state_dict_metadata
        wanted = {name: one for name, one in tensors.items() if name.startswith(_WEIGHTS) and hasattr(one, "size")}
        state = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in wanted.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            load(state, checkpoint_id=path, no_dist=True)
    except OSError:
        raise
    except Exception as error:  # as for a file
        raise ValueError(f"{path} is not a sharded checkpoint or is damaged: {error}.") from None
    return rest | {"state_dict": {name.partition(".")[2]: value for name, value in state.items()}}


class _HarmlessUnpickler(pickle.Unpickler):
    """Reads names, shapes and places of tensors, and refuses everything else that a pickle can call."""

    def find_class(self, module: str, name: str) -> Any:
        if module in _HARMLESS_MODULES and "." not in name:
            found = super().find_class(module, name)
            of_metadata = module == _METADATA_MODULE and isinstance(found, type)
            if of_metadata or isinstance(found, torch.dtype) or (module, name) in _HARMLESS:
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place among the names of weights")


_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_HARMLESS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    ("collections", "OrderedDict"),
}
_HARMLESS_MODULES = {_METADATA_MODULE, *(module for module, _ in _HARMLESS)}


# ---------------------------------------------------------------------- history


def _history_of_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    data = checkpoint.get("datamodule_hyper_parameters")
    return _history(checkpoint.get("global_step"), data, checkpoint.get("metrics"))


def _history_of_module(module: Any) -> dict[str, str]:
    """Of a module under a Trainer; one without has none."""
    trainer = getattr(module, "_trainer", None)
    if trainer is None:
        return {}
    data = getattr(trainer, "datamodule", None)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    return _history(trainer.global_step, getattr(data, "hparams", None), metrics)


def _history(steps: int | None, data: Mapping[str, Any] | None, metrics: Mapping[str, float] | None) -> dict[str, str]:
    told: dict[str, str] = {}
    if steps is not None:
        told["steps"] = str(steps)
    if data:
        told["data"] = json.dumps({k: v for k, v in data.items() if k not in _PRIVATE_SETTINGS}, default=repr)
    if metrics:
        told["metrics"] = json.dumps({name: round(float(value), 6) for name, value in metrics.items()})
    return told
