"""State of a module in a checkpoint: weight names without wrappers, and arguments that rebuild the backbone."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import fsspec
import torch

from mlssl.backbones import built_as
from mlssl.private import trainer_of
from mlssl.received import OWN_INSTANTIATOR, check_downloads_nothing, check_names_no_code, is_remote
from mlssl.safe_yaml import read_yaml
from mlssl.waiting import READ_TIMEOUT, call_with_timeout
from mlssl.weights.checkpoints import BACKBONE_KEY, check_content, load_plain

_HYPER_PARAMETERS = ("hyper_parameters", "hparams", "module_arguments")
"""Entries from which Lightning reads hyper-parameters; the last two are from its first releases."""

_ARCHITECTURE = ("backbone", "backbone_kwargs", "projection_dim", "predictor_dim")


def check_received(
    source: str | os.PathLike[str] | IO[bytes], hparams_file: str | os.PathLike[str] | None, given: Mapping[str, Any]
) -> Any:
    """Refuse a checkpoint whose hyper-parameters name code or would cause a download.

    Args:
        source: Path or address of a checkpoint, or an open file.
        hparams_file: YAML that replaces its hyper-parameters, or None.
        given: Hyper-parameters passed by the user, which are not checked.

    Returns:
        The source for Lightning: the path, or an open file at its original position.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: It is refused.
    """
    if isinstance(source, (str, os.PathLike)) and not is_remote(os.fspath(source)):
        content = load_plain(Path(source))
    else:
        if isinstance(source, (str, os.PathLike)):
            source = io.BytesIO(_fetched(os.fspath(source)))
        start = source.tell()
        content = torch.load(source, map_location="cpu", weights_only=True)
        source.seek(start)
    path = source if isinstance(source, (str, os.PathLike)) else "the checkpoint"
    check_content(content, path)
    is_yaml = hparams_file is not None and str(hparams_file).endswith((".yaml", ".yml"))
    of_file = read_yaml(Path(hparams_file)) if hparams_file is not None and is_yaml else None
    is_changed = False
    for values in (*(content.get(key) for key in _HYPER_PARAMETERS), of_file):
        if not isinstance(values, dict):
            continue
        if values is not of_file and values.get("_instantiator") == OWN_INSTANTIATOR:
            del values["_instantiator"]  # Lightning would import the named object
            is_changed = True
        asked = {name: value for name, value in values.items() if name not in given}
        check_names_no_code(asked, path)
        check_downloads_nothing(asked, path)
    if not is_changed:
        return source
    changed = io.BytesIO()
    torch.save(content, changed)
    changed.seek(0)
    return changed


def _fetched(address: str) -> bytes:
    """Bytes of a file at an address."""
    try:
        file = call_with_timeout(lambda: fsspec.open(address, "rb").open())
        try:
            return bytes(call_with_timeout(file.read, seconds=READ_TIMEOUT))
        finally:
            file.close()
    except TimeoutError as error:
        raise OSError(
            f"cannot read the checkpoint {address!r} ({error}): check the connection, or fetch the file first"
        ) from error


def repair_saved_state(module: Any, checkpoint: dict[str, Any]) -> None:
    """Strip torch.compile's prefix and arguments that read weights; add the backbone's arguments and the metrics."""
    checkpoint["state_dict"] = {_plain_name(name): value for name, value in checkpoint["state_dict"].items()}
    hparams, origin = checkpoint.get("hyper_parameters", {}), built_as(module.backbone)
    if origin is not None:
        if hparams.get("backbone_kwargs"):
            hparams["backbone_kwargs"] = origin[1]
        mean, std = (buffer.flatten().tolist() for buffer in (module.pixel_mean, module.pixel_std))
        checkpoint[BACKBONE_KEY] = {"name": origin[0], "arguments": origin[1], "mean": mean, "std": std}
    if trainer_of(module) is not None:  # for exports of the backbone
        metrics = module.trainer.callback_metrics
        checkpoint["metrics"] = {name: value.item() for name, value in metrics.items()}


def repair_loaded_state(module: Any, checkpoint: dict[str, Any]) -> None:
    """Rename the weights to the module's names, compiled or not.

    Raises:
        ValueError: The backbone was passed as a network and must be passed again, or the architecture differs.
    """
    own = module.state_dict()
    own_names = {_plain_name(name): name for name in own}
    state = {own_names.get(_plain_name(name), name): value for name, value in checkpoint["state_dict"].items()}
    checkpoint["state_dict"] = state
    names_fit = {name for name in own if name.startswith("backbone.")} == {
        name for name in state if name.startswith("backbone.")
    }
    there, here = checkpoint.get("hyper_parameters", {}), dict(module.hparams)
    if (
        not names_fit
        and "hyper_parameters" in checkpoint
        and "backbone" not in there
        and BACKBONE_KEY not in checkpoint
    ):
        raise ValueError(
            "The backbone of this checkpoint was passed as a network, which a checkpoint does not contain: pass the "
            "same one, "
            "MultiLabelSSLModule.load_from_checkpoint(path, backbone=net)."
        )
    if not names_fit or any(name in own and own[name].shape != value.shape for name, value in state.items()):
        differing = [
            f"{name}={there[name]!r} there, {here.get(name)!r} here"
            for name in _ARCHITECTURE
            if name in there and there[name] != here.get(name)
        ]
        raise ValueError(
            "The checkpoint does not fit this module: "
            f"{'; '.join(differing) or 'its weights have other names or shapes'}. "
            "Build the module as it was, or leave the checkpoint out."
        )


def _plain_name(name: str) -> str:
    return name.replace("_orig_mod.", "")
