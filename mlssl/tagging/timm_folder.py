"""A whole tagger as a classifier of timm: a folder that `timm.create_model` opens, with head and class names."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlssl.atomic import files_written_aside
from mlssl.backbones import TORCHVISION_PREFIX
from mlssl.export import file_header
from mlssl.export.networks import write_timm_folder
from mlssl.tagging.tagger import Tagger
from mlssl.weights.sources import Backbone

MAX_DIFFERENCE = 1e-4
"""Maximum allowed difference of a probability."""


def export_timm_classifier(tagger: Tagger, folder: str | os.PathLike[str], *, overwrite: bool = False) -> float:
    """Write a tagger as a folder for timm, including the head: the sigmoid of an output is a label's probability.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` builds it. Standardisation of the features and calibration
    are folded into the classifier's weights. `config.json` has the class names as "label_names", and under "mlssl" the
    "thresholds" and the "size" of the images as JSON. The folder is loaded by timm and compared before it gets its
    name.

    Args:
        tagger: Tagger of a timm network, with average pooling; it does not change.
        folder: Folder to write; other files in it are kept.
        overwrite: Whether existing files may be replaced.

    Returns:
        The largest difference of a probability on random images.

    Raises:
        ValueError: If the backbone is not of timm or takes no linear classifier, the pooling is not the average, or
            probabilities differ by more than 1e-4.
        FileExistsError: If one of its files exists and `overwrite` is False.
        OSError: If it cannot be written.
    """
    import timm

    network = tagger.network
    if network.pooling != "avg":
        raise ValueError(
            f"the tagger pools by {network.pooling!r}, but timm's classifier by the average: save with --pooling avg"
        )
    model = copy.deepcopy(network.model).to("cpu")
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        _put_in_head(model, network.classifier, network.mean.cpu(), network.scale.cpu(), network.calibration)
        header = file_header(model, network.classifier.in_features) | {
            "thresholds": json.dumps([round(value, 6) for value in tagger.thresholds.values.tolist()]),
            "size": json.dumps(tagger.size),
        }
        shape = (2, len(model.mean), *tagger.size)
        images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        with files_written_aside(folder, overwrite=overwrite) as aside:
            write_timm_folder(model, aside, header, tagger.classes)
            loaded = timm.create_model(f"local-dir:{aside}", pretrained=True).eval()
            actual: Tensor = loaded(model.normalize(images)).sigmoid()
            expected = copy.deepcopy(network).to("cpu")(images)
            difference: float = (actual - expected).abs().max().item()
            if not difference <= MAX_DIFFERENCE:
                raise ValueError(
                    f"the probabilities of timm's network differ by {difference:.1e}, at most {MAX_DIFFERENCE:.0e} "
                    f"is allowed, and was not kept: export {Path(folder).name}.onnx instead"
                )
    return difference


def _put_in_head(model: Backbone, classifier: nn.Linear, mean: Tensor, scale: Tensor, calibration: Any) -> None:
    """Copy the classifier into timm's network, with standardisation and calibration in its weights."""
    backbone: Any = model.backbone
    is_timm = hasattr(backbone, "reset_classifier") and not (model.name or TORCHVISION_PREFIX).startswith(
        TORCHVISION_PREFIX
    )
    if is_timm:
        backbone.reset_classifier(classifier.out_features)
    head = backbone.get_classifier() if is_timm else None
    if not isinstance(head, nn.Linear) or head.in_features != classifier.in_features:
        raise ValueError(f"{type(backbone).__name__} takes no linear classifier in timm: export an .onnx file instead")
    weight = classifier.weight.cpu() * scale
    head.weight.copy_(calibration.slope * weight)
    head.bias.copy_(calibration.slope * (classifier.bias.cpu() - weight @ mean) + calibration.shift)
