"""Open checkpoints and weight files without running code: contents, plain names, and the weights of one network."""

from __future__ import annotations

import difflib
import errno
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlssl.received import check_downloads_nothing, check_names_no_code, check_statistics
from mlssl.weights.sharded import SHARDS, sharded_weights

BACKBONE_KEY = "backbone"
"""Checkpoint entry: {"name", "arguments", "mean", "std"} of a backbone built by name."""

_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts that torch.compile, FSDP and activation checkpointing add to weight names."""

_REST_OF_SHARDS = "meta.pt"
"""Lightning's file next to the shards, with everything except the weights."""

_OF_A_RUN = ("loops", "callbacks", "optimizer_states", "lr_schedulers")
"""Checkpoint entries needed to resume, in addition to the weights."""

_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("hyper_parameters", "backbone", "datamodule_hyper_parameters", "metrics"), (dict, type(None))),
    **dict.fromkeys(("loops", "callbacks"), (dict,)),
    **dict.fromkeys(("optimizer_states", "lr_schedulers"), (list,)),
    **dict.fromkeys(("global_step", "epoch"), (int,)),
}
"""Types of checkpoint entries, if present."""


class Architecture(NamedTuple):
    """The backbone described in a checkpoint."""

    name: str
    """Name for `build_backbone`."""
    arguments: dict[str, Any]
    mean: Sequence[float] | None
    """Pixel mean; None for the network's default."""
    std: Sequence[float] | None


def plain_name(name: str) -> str:
    """Name of a weight without the prefixes of torch.compile, FSDP, activation checkpointing and DDP.

    >>> plain_name("module.backbone._orig_mod.conv1.weight")
    'backbone.conv1.weight'
    """
    name = _WRAPPERS.sub("", name)
    while name.startswith("module."):  # DDP, possibly nested
        name = name.removeprefix("module.")
    return name


def load_checkpoint(path: Path) -> Any:
    """Content of a checkpoint: a file in full, an FSDP shard folder without the optimizer state.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: It is not a checkpoint, is damaged or contains pickled code.
    """
    if not path.is_dir():
        return load_plain(path)
    if not holds_shards(path):
        raise ValueError(
            f"{path} is a folder without shards (it has no {SHARDS}): give the path of a checkpoint, such as "
            "checkpoints/last.ckpt in a run folder."
        )
    rest: dict[str, Any] = load_plain(path / _REST_OF_SHARDS)
    return rest | {"state_dict": sharded_weights(path)}


def load_plain(
    path: Path,
    kind: str = "a checkpoint",
    remedies: tuple[str, str] = (
        "give a .ckpt that the Trainer saved",
        "train with hyper-parameters that are plain values",
    ),
    map_location: Any = "cpu",
) -> Any:
    """Load a file written by torch.save, tensors and plain values only, without running code in it.

    Args:
        path: The file.
        kind: Expected kind of file, for the message.
        remedies: Advice for another kind of file, and for pickled code.
        map_location: See `torch.load`.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is another kind of file, is damaged (wrong checksum), or contains pickled code.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}: give the path of an existing .ckpt file.")
    _check_sums(path, kind, remedies[0])
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # the unpickler raises almost anything for foreign bytes
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: the bytes contain a wrong offset
            raise
        raise ValueError(_why_not_opened(path, error, kind, remedies)) from None


def check_resumable(content: Any, path: Path) -> None:
    """Refuse a checkpoint that a run cannot resume from.

    Args:
        content: Output of `load_checkpoint`.
        path: For messages.

    Raises:
        ValueError: It contains only weights, or is not a Trainer checkpoint.
    """
    check_content(content, path)
    lacking = [key for key in _OF_A_RUN if key not in content]
    if lacking:
        raise ValueError(
            f"{path} has no {', '.join(lacking)}, so no run can resume from it: start a new run from its weights, "
            f"--start_from {path}, and save full checkpoints, save_weights_only=False."
        )
    try:
        loop = content["loops"]["fit_loop"]
        counts = [loop["epoch_loop.batch_progress"]["total"][name] for name in ("completed", "ready")]
        counts.append(loop["epoch_loop.state_dict"]["_batches_that_stepped"])
    except (KeyError, TypeError):
        counts = [None]
    if not all(isinstance(count, int) for count in counts):
        raise ValueError(
            f"{path} does not give the number of steps of its run: the file was changed or is damaged, give another "
            f"checkpoint, or start a new run from its weights, --start_from {path}."
        )


def check_content(content: Any, path: object) -> None:
    """Refuse a checkpoint whose entries have other types than the Trainer writes.

    Raises:
        ValueError: Names the entry.
    """
    if not isinstance(content, Mapping) or not isinstance(content.get("state_dict"), Mapping):
        raise ValueError(f"{path} has no state_dict, so it is not a Trainer checkpoint: give one.")
    wrong = next((name for name, kind in _TYPES.items() if not isinstance(content.get(name, kind[0]()), kind)), None)
    state = content["state_dict"].items()
    if wrong is None and not all(isinstance(name, str) and _is_state(name, value) for name, value in state):
        wrong = "state_dict"
    metrics = (content.get("metrics") or {}).items() if wrong is None else ()
    if not all(isinstance(name, str) and isinstance(value, (int, float)) for name, value in metrics):
        wrong = "metrics"
    if wrong is not None:
        raise ValueError(
            f"The entry {wrong!r} of {path} does not have the Trainer's format: the file was changed or is damaged, "
            "give another checkpoint."
        )


def holds_shards(path: Path) -> bool:
    """Whether it is a sharded checkpoint, FSDP's default."""
    return (path / SHARDS).is_file()


def architecture(checkpoint: Mapping[str, Any], path: Path) -> Architecture:
    """Name, arguments and pixel statistics of the backbone of a checkpoint of a `MultiLabelSSLModule`.

    Raises:
        ValueError: It does not name the backbone, names one that would be downloaded or code to import, or has entries
            of a wrong type.
    """
    check_content(checkpoint, path)
    settings = checkpoint.get("hyper_parameters") or {}
    described = checkpoint.get(BACKBONE_KEY) or {
        "name": settings.get("backbone"),
        "arguments": settings.get("backbone_kwargs"),
        "mean": settings.get("mean"),
        "std": settings.get("std"),
    }
    if not isinstance(described.get("name"), str):
        raise ValueError(
            f"{path} does not name its backbone, which was passed as a network or by a subclass: load the module, "
            "MultiLabelSSLModule.load_from_checkpoint(path, backbone=net), and pass that."
        )
    name: str = described["name"]
    arguments, mean, std = (described.get(key) for key in ("arguments", "mean", "std"))
    arguments = {} if arguments is None else arguments
    check_received_backbone(name, arguments, mean, std, path)
    mean, std = (numbers and [round(number, 6) for number in numbers] for numbers in (mean, std))
    return Architecture(name, arguments, mean, std)


def check_received_backbone(name: object, arguments: object, mean: object, std: object, path: Path) -> None:
    """Refuse a backbone description that would run code, cause a download, or is invalid.

    Raises:
        ValueError: Names the value.
    """
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise ValueError(
            f"The arguments of the backbone in {path} are {arguments!r:.80}, not a mapping from names: the file was "
            "changed or is damaged, pass another."
        )
    check_names_no_code(arguments, path)
    check_downloads_nothing({"backbone": name, "backbone_kwargs": arguments}, path)
    check_statistics(mean, std, path)


def weights_of(checkpoint: Any, network: str) -> dict[str, Tensor]:
    """Weights of one network of a checkpoint, under the network's own names; {} if there are none.

    Args:
        checkpoint: Output of `load_checkpoint`.
        network: Name of the submodule, such as "backbone".
    """
    prefix = plain_name(f"{network}.")
    plain = {plain_name(name): value for name, value in _state(checkpoint).items()}
    return {name.removeprefix(prefix): value for name, value in plain.items() if name.startswith(prefix)}


def check_holds(checkpoint: Any, network: str, path: Path) -> None:
    """Refuse a checkpoint without weights of a network.

    Raises:
        ValueError: Names existing submodules.
    """
    if not weights_of(checkpoint, network):
        nearest = nearest_network(network, map(plain_name, _state(checkpoint)))
        remedy = nearest or "give a Trainer checkpoint of a MultiLabelSSLModule."
        raise ValueError(f"{path} has no weights of {network}, its state_dict has no '{network}.…' entries: {remedy}")


def nearest_network(network: str, names: Iterable[str]) -> str:
    """Sentence with the submodules whose names are nearest to `network`; "" if there are none.

    Args:
        network: Requested name.
        names: Dotted names of weights.
    """
    parts = [name.split(".")[:-1] for name in names]
    networks = sorted({".".join(part[:depth]) for part in parts for depth in range(1, min(len(part), 4) + 1)})
    nearest = difflib.get_close_matches(network, networks, n=3, cutoff=0.4) or networks[:3]
    return f"pass the name of an existing submodule, such as {', '.join(map(repr, nearest))}." if nearest else ""


def _state(checkpoint: Any) -> dict[str, Tensor]:
    state = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    return {name: value for name, value in state.items() if isinstance(value, Tensor)} if state else {}


def _is_state(name: str, value: object) -> bool:
    return isinstance(value, Tensor) or name.endswith("_extra_state")


def _check_sums(path: Path, kind: str, remedy: str) -> None:
    """Compare the checksums of torch.save, which torch.load ignores; older files have none."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            is_packed = sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size
            wrong = None if is_packed else archive.testzip()
    except Exception as error:  # zipfile raises almost anything for foreign bytes
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        is_packed, wrong = True, None
    if is_packed:
        raise ValueError(f"{path} is not {kind} or is damaged: {remedy}.")
    if wrong is not None:
        raise ValueError(f"{path} is damaged, the checksum of {wrong!r} in it is wrong: copy it again, or {remedy}.")


def _why_not_opened(path: Path, error: Exception, kind: str, remedies: tuple[str, str]) -> str:
    """Replaces torch's message, which advises running the code in the file."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
        names = f" (it names {named[1]})" if named else ""
        return (
            f"{path} contains pickled Python objects, which could run any code when opened, and was refused{names}: "
            f"{remedies[1]}."
        )
    return f"{path} is not {kind} or is damaged: {remedies[0]}."


def misfit(network: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Why weights of these names and shapes do not fit a network, with examples; "" if they fit."""
    own = network.state_dict()
    faults = {
        # Files from before torch 0.4.1 lack these counters, and load_state_dict does not need them.
        "missing": sorted(name for name in own.keys() - weights.keys() if not name.endswith("num_batches_tracked")),
        "unexpected": sorted(weights.keys() - own.keys()),
        "with another shape": sorted(
            name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape
        ),
    }
    return "; ".join(
        f"{len(names)} {fault}, {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for fault, names in faults.items()
        if names
    )


def take_weights(model: Any, source: str) -> None:
    """Load all weights of a checkpoint, including the heads.

    Raises:
        ValueError: The weights do not fit the model, or the file is not a checkpoint.
    """
    checkpoint = load_plain(Path(source))
    check_content(checkpoint, Path(source))
    try:
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{source} does not fit the model, give the --model.backbone and widths of its training: {error}"
        ) from None
