"""What a run starts from: another run, or a backbone with published weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlssl.run_folder import checkpoint_at
from mlssl.weights.pretrained import PRETRAINED, asks_for_weights, check_tag, why_not_loaded

_FROM_FILE = "--model.backbone NAME --model.backbone_kwargs '{pretrained: true, pretrained_cfg_overlay: {file: FILE}}'"

_CHECKPOINTS = ("ckpt_path", "start_from")


def resolve_run_folders(settings: Any) -> None:
    """Replace a run folder by its last checkpoint.

    Args:
        settings: Settings of the command; changed in place.

    Raises:
        FileNotFoundError: If the run has not saved a checkpoint.
    """
    for name in _CHECKPOINTS:
        path = settings.get(name)
        if path and Path(path).is_dir():
            settings[name] = str(checkpoint_at(Path(path)))


def take_published_weights(settings: Any) -> str | None:
    """Set the argument that loads the published weights named by the backbone's name.

    A run that takes all weights from a checkpoint loads none; the name then only gives the architecture.

    Args:
        settings: Settings of the command; changed in place.

    Returns:
        The given name; None if it names no weights.

    Raises:
        ValueError: If timm knows no weights of this tag.
    """
    model = settings.get("model") or {}
    name = model.get("backbone")
    if "backbone_kwargs" not in model or not isinstance(name, str) or not asks_for_weights(name):
        return None
    check_tag(name, _FROM_FILE)
    model["backbone"] = name.removesuffix(PRETRAINED)
    if any(settings.get(one) for one in _CHECKPOINTS):
        return None
    given = model["backbone_kwargs"]
    model["backbone_kwargs"] = {"pretrained": True, **(given or {})}
    return name


def weights_message(name: str | None, error: Exception) -> str | None:
    """Why published weights could not be loaded; None for an error that already says what is wrong.

    Args:
        name: Result of `take_published_weights`.
        error: Error raised while the network was built.
    """
    return (
        None if name is None or isinstance(error, (TypeError, ValueError)) else why_not_loaded(name, error, _FROM_FILE)
    )
