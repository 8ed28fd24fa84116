"""Checkpoints and files of weights, opened without running code: contents, plain names, and one network's part."""

from __future__ import annotations

import difflib
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put in front of or into the names of weights."""

_SHARDS = ".metadata"
"""File that names the tensors of a checkpoint which `torch.distributed.checkpoint` wrote, a folder."""

_REST_OF_SHARDS = "meta.pt"
"""File of Lightning beside the shards, with all of a checkpoint but its weights."""

_WEIGHTS = ("model.", "state_dict.")
"""Before the names of weights in shards: the former by FSDP's strategy, the latter by ModelParallel's."""


class Architecture(NamedTuple):
    """What a checkpoint says of its backbone."""

    name: str
    """As `build_backbone` takes it."""
    arguments: dict[str, Any]
    mean: Sequence[float] | None
    """Of the pixels; None for those of the network itself."""
    std: Sequence[float] | None


def plain_name(name: str) -> str:
    """Name of a weight without the prefixes of torch.compile, FSDP, activation checkpointing and DDP.

    >>> plain_name("module.backbone._orig_mod.conv1.weight")
    'backbone.conv1.weight'
    """
    name = _WRAPPERS.sub("", name)
    while name.startswith("module."):  # of DDP, and of wrappers around it
        name = name.removeprefix("module.")
    return name


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


def holds_shards(path: Path) -> bool:
    """Whether it is a checkpoint of many files, as FSDP's processes write one by default."""
    return (path / _SHARDS).is_file()


def architecture(checkpoint: Mapping[str, Any], path: Path) -> Architecture:
    """Name, arguments and pixel statistics of the backbone of a checkpoint of a `MultiLabelSSLModule`.

    Raises:
        ValueError: If it does not name the backbone.
    """
    settings = checkpoint.get("hyper_parameters") or {}
    described = checkpoint.get("backbone") or {
        "name": settings.get("backbone"),
        "arguments": settings.get("backbone_kwargs"),
        "mean": settings.get("mean"),
        "std": settings.get("std"),
    }
    if not isinstance(described["name"], str):
        raise ValueError(
            f"{path} does not name its backbone, which was given as a network or by a subclass: "
            "load the module, MultiLabelSSLModule.load_from_checkpoint(path, backbone=net), and pass that."
        )
    mean, std = (
        numbers and [round(number, 6) for number in numbers] for numbers in (described["mean"], described["std"])
    )
    return Architecture(described["name"], described["arguments"] or {}, mean, std)


def weights_of(checkpoint: Any, network: str) -> dict[str, Tensor]:
    """Weights of one network of a checkpoint, under the names that the network itself gives them; {} for none.

    Args:
        checkpoint: Of `load_checkpoint`.
        network: Name of the submodule, such as "backbone".
    """
    prefix = plain_name(f"{network}.")
    plain = {plain_name(name): value for name, value in _state(checkpoint).items()}
    return {name.removeprefix(prefix): value for name, value in plain.items() if name.startswith(prefix)}


def check_holds(checkpoint: Any, network: str, path: Path) -> None:
    """Refuse a checkpoint without weights of a network.

    Raises:
        ValueError: Naming submodules that there are.
    """
    if not weights_of(checkpoint, network):
        nearest = nearest_network(network, map(plain_name, _state(checkpoint)))
        remedy = nearest or "give a checkpoint that the Trainer saved of a MultiLabelSSLModule."
        raise ValueError(f"{path} holds no {network}, its state_dict has no '{network}.…' entries: {remedy}")


def nearest_network(network: str, names: Iterable[str]) -> str:
    """Sentence that tells the submodules whose names are nearest to `network`; "" where there are none.

    Args:
        network: Name that was asked for.
        names: Dotted names of weights.
    """
    parts = [name.split(".")[:-1] for name in names]
    networks = sorted({".".join(part[:depth]) for part in parts for depth in range(1, min(len(part), 4) + 1)})
    nearest = difflib.get_close_matches(network, networks, n=3, cutoff=0.4) or networks[:3]
    return f"pass the name of a submodule that it has, such as {', '.join(map(repr, nearest))}." if nearest else ""


def _state(checkpoint: Any) -> dict[str, Tensor]:
    state = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    return state or {}


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
