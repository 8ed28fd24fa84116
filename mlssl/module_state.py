"""State of a module in a checkpoint: names of weights without wrappers, and what rebuilds the backbone alone."""

from __future__ import annotations

from typing import Any

from mlssl.backbones import built_as
from mlssl.private import trainer_of

BACKBONE_KEY = "backbone"
"""Entry of a checkpoint: {"name", "arguments", "mean", "std"} of a backbone that was built by name."""

_ARCHITECTURE = ("backbone", "backbone_kwargs", "projection_dim", "predictor_dim")


def repair_saved_state(module: Any, checkpoint: dict[str, Any]) -> None:
    """Strip the prefix of torch.compile and arguments that read weights; add the backbone's build and the metrics."""
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
    """Give the weights the names that the module has, compiled or not.

    Raises:
        ValueError: If the backbone was a network, which has to be passed again, or the architecture is another one.
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
            "The backbone of this checkpoint was given as a network, which no checkpoint holds: pass the same one, "
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
