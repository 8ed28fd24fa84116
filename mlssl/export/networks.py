"""Weight files under the network's own names: timm's file and folder, torchvision's, and safetensors."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mlssl.backbones import TORCHVISION_PREFIX, image_shape
from mlssl.export.card import CARD, model_card
from mlssl.weights.sources import DIGEST, TIMM_CONFIG, TIMM_WEIGHTS, Backbone, digest

# ---------------------------------------------------------------------- writers


def write_safetensors(source: Backbone, path: Path, header: Mapping[str, str]) -> None:
    """Tensors, header and checksum."""
    tensors = tensors_of(source.backbone)
    path.write_bytes(save(tensors, {**header, DIGEST: digest(tensors)}))


def write_state_dict(source: Backbone, path: Path, header: Mapping[str, str]) -> None:  # noqa: ARG001  the format has no header
    """Tensors only, readable by `torch.load` with `weights_only=True`."""
    buffer = io.BytesIO()  # written by Python, because torch does not report a full disk
    torch.save(tensors_of(source.backbone), buffer)
    path.write_bytes(buffer.getbuffer())


def write_timm_folder(source: Backbone, path: Path, header: Mapping[str, str], classes: Sequence[str] = ()) -> None:
    """Weights and `config.json` for timm's `local-dir:` and `hf-hub:`, and the model card.

    Args:
        source: Network, with a classifier if there are classes.
        path: Folder to write to.
        header: Header of the weights file.
        classes: Names of the classifier's outputs.
    """
    mean, std = source.mean, source.std
    architecture = _bare_name(source).partition(".")[0]
    own = getattr(source.backbone, "pretrained_cfg", None) or _timm_config(architecture)
    config = {
        "architecture": architecture,
        "num_classes": len(classes),
        "num_features": int(header["features"]),
        "model_args": source.arguments | _image_size(source.backbone),
        "pretrained_cfg": {
            "num_classes": len(classes),
            "input_size": own.get("input_size") or image_shape(source.backbone),
            "fixed_input_size": bool(own.get("fixed_input_size")),
            "interpolation": own.get("interpolation", "bilinear"),
            "crop_pct": own.get("crop_pct", 0.875),
            "mean": list(mean),
            "std": list(std),
            # timm reads these to add a new head or to change the number of channels.
            "classifier": own.get("classifier"),
            "first_conv": own.get("first_conv"),
        },
        "mlssl": dict(header),
    } | ({"label_names": list(classes)} if classes else {})
    (path / TIMM_CONFIG).write_text(json.dumps(config, indent=2))
    (path / CARD).write_text(model_card(header, classes), encoding="utf-8")
    write_safetensors(source, path / TIMM_WEIGHTS, header)


def _timm_config(architecture: str) -> dict[str, Any]:
    """Config of a torchvision network that timm can also build."""
    import timm

    config = timm.get_pretrained_cfg(architecture)
    return config.to_dict() if config else {}


def _image_size(network: nn.Module) -> dict[str, list[int]]:
    """Image size of a transformer: for its default size timm would build other position embeddings."""
    size = getattr(getattr(network, "patch_embed", None), "img_size", None)
    return {"img_size": list(size)} if size else {}


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """Weights and statistics by name; cloned, because safetensors refuses two names for one tensor."""
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in network.state_dict().items()}


# ---------------------------------------------------------------------- loaders


def load_timm(source: Backbone, file: Path | None) -> tuple[nn.Module, str]:
    """Build with `timm.create_model` and the file's weights, if given; returns the network and the code."""
    import timm

    name = _bare_name(source)
    network = timm.create_model(name, num_classes=0, checkpoint_path=str(file or ""), **source.arguments)
    arguments = _spelled(source.arguments)
    return network, f"network = timm.create_model({name!r}, num_classes=0, checkpoint_path={str(file)!r}{arguments})"


def load_timm_folder(source: Backbone, folder: Path | None) -> tuple[nn.Module, str]:
    """The same from a folder, which needs no further arguments."""
    import timm

    if folder is None:
        return load_timm(source, None)
    name = f"local-dir:{folder}"
    network = timm.create_model(name, pretrained=True, num_classes=0)
    return network, f"network = timm.create_model({name!r}, pretrained=True, num_classes=0)"


def load_torchvision(source: Backbone, file: Path | None) -> tuple[nn.Module, str]:
    """Build with `torchvision.models.get_model`, without the classifier."""
    from torchvision import models

    name = _bare_name(source).partition(".")[0]  # without timm's weight tag
    network: nn.Module = models.get_model(name, **source.arguments)
    classifier = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)][-1]
    network.set_submodule(classifier, nn.Identity())
    if file is not None:
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network, (
        f"network = torchvision.models.get_model({name!r}{_spelled(source.arguments)})\n"
        f"network.set_submodule({classifier!r}, torch.nn.Identity())\n"
        f"network.load_state_dict(torch.load({str(file)!r}, weights_only=True))"
    )


def load_own(source: Backbone, file: Path | None) -> tuple[nn.Module, str]:
    """A copy of the network with the file's weights."""
    network = copy.deepcopy(source.backbone)
    if file is not None:
        network.load_state_dict(load_file(file))
    return network, f"network.load_state_dict(safetensors.torch.load_file({str(file)!r}))"


def same_weights(source: Backbone, network: nn.Module) -> bool:
    """Whether all weight names and shapes are equal."""
    own, built = ({name: value.shape for name, value in one.state_dict().items()} for one in (source.backbone, network))
    return own == built


def _bare_name(source: Backbone) -> str:
    return (source.name or "").removeprefix(TORCHVISION_PREFIX)


def _spelled(arguments: dict[str, Any]) -> str:
    return "".join(f", {name}={value!r}" for name, value in arguments.items())
