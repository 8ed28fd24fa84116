"""What a run starts from: the folder of another run, or a backbone with published weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlssl.run_folder import checkpoint_at
from mlssl.weights.pretrained import PRETRAINED, asks_for_weights, check_tag, why_not_loaded

_FROM_FILE = "--model.backbone NAME --model.backbone_kwargs '{pretrained: true, pretrained_cfg_overlay: {file: FILE}}'"

_CHECKPOINTS = ("ckpt_path", "start_from")


def take_checkpoints_of_runs(settings: Any) -> None:
    """Replace a run folder by its last checkpoint.

    Args:
        settings: Of the command; changed.

    Raises:
        FileNotFoundError: If the run has not saved a checkpoint.
    """
    for name in _CHECKPOINTS:
        path = settings.get(name)
        if path and Path(path).is_dir():
            settings[name] = str(checkpoint_at(Path(path)))


def take_published_weights(settings: Any) -> str | None:
    """Set the argument that loads the published weights which the name of the backbone asks for.

    A run that takes all weights from a checkpoint needs none; the name stays, which then only says the architecture.

    Args:
        settings: Of the command; changed.

    Returns:
        The name as it was given; None where it asks for no weights.

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


def said_of_weights(name: str | None, error: Exception) -> str | None:
    """Why published weights could not be loaded; None for an error that already says what is wrong.

    Args:
        name: Of `take_published_weights`.
        error: Error raised while the network was built.
    """
    return (
        None if name is None or isinstance(error, (TypeError, ValueError)) else why_not_loaded(name, error, _FROM_FILE)
    )
