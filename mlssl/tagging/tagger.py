"""A tagger: probabilities of the labels of an image, from one self-contained file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize

from mlssl.atomic import check_free, written_aside
from mlssl.backbones import feature_width
from mlssl.choices import Pooling
from mlssl.data.decoding import ImageArray
from mlssl.data.records import check_class_names
from mlssl.feature_maps import feature_map, pooled_features
from mlssl.modes import eval_mode
from mlssl.tagging.thresholds import Calibration, Thresholds
from mlssl.weights.sources import (
    DIGEST,
    Backbone,
    backbone_of_file,
    digest,
    entry_of_header,
    read_safetensors,
)

MAX_SIDE = 4096
"""Maximum height or width of images in an untrusted file."""

_BATCH = 32
_BACKBONE = "backbone."


class Tags(NamedTuple):
    """Output of a tagger for n images: the labels of each, most probable first, and all probabilities (n, L)."""

    labels: list[list[str]]
    probabilities: Tensor


class LabelNetwork(nn.Module):
    """From images uint8 (n, C, H, W) to probabilities (n, L).

    Args:
        model: The backbone and its normalisation.
        mean: (D,), subtracted from the features.
        scale: (D,), multiplied with them afterwards.
        weight: (L, D) of the classifier on these standardised features.
        bias: (L,).
        calibration: From logits to probabilities.
        pooling: Pooling of the last feature map.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        model: Backbone,
        mean: Tensor,
        scale: Tensor,
        weight: Tensor,
        bias: Tensor,
        calibration: Calibration,
        pooling: Pooling,
    ) -> None:
        super().__init__()
        self.model, self.calibration, self.pooling = model, calibration, pooling
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", scale.float())
        self.classifier = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.classifier.weight.copy_(weight)
            self.classifier.bias.copy_(bias)
        self.requires_grad_(False).eval()

    def logits(self, features: Tensor) -> Tensor:
        """Features (…, D) to logits (…, L)."""
        logits: Tensor = self.classifier((features - self.mean) * self.scale)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 (n, C, H, W) to probabilities (n, L)."""
        features = pooled_features(self.model.backbone, self.model.normalize(images), self.pooling)
        return self.calibration(self.logits(features.float()))


class Tagger:
    """Predicts the labels of images; created by `mlssl linear --save` or :func:`mlssl.tagging.fit.fit_tagger`.

    Args:
        network: From images to probabilities.
        classes: L names.
        thresholds: A label is predicted if its probability is above its threshold.
        size: Height and width to which images are resized.
        about: Further entries of the file, such as how thresholds were chosen.
    """

    def __init__(
        self,
        network: LabelNetwork,
        classes: Sequence[str],
        thresholds: Thresholds,
        size: tuple[int, int],
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.network, self.classes, self.thresholds, self.size = network, tuple(classes), thresholds, size
        self.about = dict(about or {})

    def __call__(self, images: Sequence[ImageArray]) -> Tags:
        """Labels and probabilities of images of any sizes.

        Args:
            images: RGB, uint8 (H, W, 3) each.

        Raises:
            TypeError: If one is not uint8 of three dimensions.
            ValueError: If one has another number of channels than the backbone.
        """
        pixels = [self._resized(image, index) for index, image in enumerate(images)]
        device = self.network.mean.device
        with torch.no_grad():
            outputs = [self.network(torch.stack(part).to(device)).cpu() for part in _parts(pixels)]
        probabilities = torch.cat(outputs) if outputs else torch.empty(0, len(self.classes))
        return Tags(self.labels(probabilities), probabilities)

    def labels(self, probabilities: Tensor) -> list[list[str]]:
        """Names of the labels (n, L) above their thresholds, most probable first."""
        given = probabilities > self.thresholds.values
        orders = probabilities.argsort(dim=1, descending=True, stable=True).tolist()
        return [
            [self.classes[label] for label in order if row[label]]
            for row, order in zip(given.tolist(), orders, strict=True)
        ]

    def maps(self, images: Sequence[ImageArray]) -> list[Tensor]:
        """Localise each label: the classifier's logits at each position of the last feature map.

        With average pooling directly before the classifier, the mean of a map is the label's logit (before
        calibration).

        Args:
            images: As for calling the tagger.

        Returns:
            (L, h, w) for each image.

        Raises:
            ValueError: If the backbone's last feature map is not accessible.
        """
        network, device = self.network, self.network.mean.device
        outputs: list[Tensor] = []
        with torch.no_grad(), eval_mode(network.model.backbone):
            for part in _parts([self._resized(image, index) for index, image in enumerate(images)]):
                normalized = network.model.normalize(torch.stack(part).to(device))
                maps = feature_map(network.model.backbone, normalized).float()
                outputs += network.logits(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).cpu()
        return outputs

    def to(self, device: torch.device | str) -> Tagger:
        """Move the network to a device; returns the tagger."""
        self.network.to(device)
        return self

    def _resized(self, image: ImageArray, index: int) -> Tensor:
        if getattr(image, "dtype", None) != "uint8" or getattr(image, "ndim", 0) != 3:
            given = f"{getattr(image, 'dtype', '')} {type(image).__name__} {getattr(image, 'shape', '')}".strip()
            raise TypeError(
                f"image {index} is not uint8 of shape (H, W, 3) but {given}: pass numpy.asarray(image.convert('RGB')) "
                "of a PIL image"
            )
        channels = len(self.network.model.mean)
        if image.shape[2] != channels:
            raise ValueError(f"image {index} has {image.shape[2]} channels, but the backbone takes {channels}")
        pixels: Tensor = resize(torch.tensor(image).permute(2, 0, 1), list(self.size), antialias=True)
        return pixels

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the whole tagger to one .safetensors file, including the backbone's weights.

        Raises:
            FileExistsError: If the file exists and `overwrite` is False.
            ValueError: If the backbone was not built by name, so that it cannot be rebuilt.
            OSError: If the file cannot be written.
        """
        network = self.network
        if network.model.name is None:
            raise ValueError(
                "The backbone was not built by name, but a tagger's file names it: pass a backbone of timm or of "
                "torchvision."
            )
        if not overwrite:
            check_free(path)
        tensors = {f"{_BACKBONE}{name}": value for name, value in network.model.backbone.state_dict().items()}
        tensors |= {f"classifier.{name}": value for name, value in network.classifier.state_dict().items()}
        tensors |= {"features.mean": network.mean, "features.scale": network.scale}
        tensors |= {f"thresholds.{name}": value for name, value in self.thresholds._asdict().items()}
        tensors = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
        header = {
            "tagger": "1",
            "backbone": network.model.name,
            "arguments": json.dumps(network.model.arguments, default=repr),
            "mean": json.dumps(network.model.mean),
            "std": json.dumps(network.model.std),
            "classes": json.dumps(self.classes),
            "size": json.dumps(self.size),
            "pooling": json.dumps(network.pooling),
            "calibration": json.dumps(network.calibration),
            "about": json.dumps(self.about, default=repr),
            DIGEST: digest(tensors),
        }
        with written_aside(path) as aside:
            aside.write_bytes(save(tensors, header))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tagger:
        """Read a file of :meth:`save`, also an untrusted one: no code is run and nothing is downloaded.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is not a tagger, is damaged, or contains invalid values.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no tagger {str(path)!r}: pass a file written by mlssl linear --save")
        header, tensors = read_safetensors(path, "pass a file written by mlssl linear --save")
        if "tagger" not in header:
            raise ValueError(f"{path} is not a tagger: pass a file written by mlssl linear --save")
        if header["tagger"] != "1":
            raise ValueError(f"{path} is a tagger of version {header['tagger']!r:.20}, but this mlssl reads version 1")
        classes, size, pooling, calibration, about = (
            entry_of_header(header, key, path) for key in ("classes", "size", "pooling", "calibration", "about")
        )
        _check_settings(classes, size, pooling, calibration, about, path)
        own = {name.removeprefix(_BACKBONE): value for name, value in tensors.items() if name.startswith(_BACKBONE)}
        model = backbone_of_file(header, own, path).frozen()
        _check_tensors(tensors, len(classes), path)
        width = feature_width(model.backbone)
        if tensors["features.mean"].shape[0] != width:
            raise ValueError(
                f"{path} contains a classifier for features of width {tensors['features.mean'].shape[0]}, but its "
                f"backbone's have width {width}: the file was changed or is damaged, save it again"
            )
        network = LabelNetwork(
            model,
            tensors["features.mean"],
            tensors["features.scale"],
            tensors["classifier.weight"],
            tensors["classifier.bias"],
            Calibration(*calibration),
            pooling,
        )
        thresholds = Thresholds(*(tensors[f"thresholds.{name}"] for name in Thresholds._fields))
        return cls(network, classes, thresholds, (size[0], size[1]), about)


def is_tagger(path: str | os.PathLike[str]) -> bool:
    """Whether a file is marked as a tagger."""
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return "tagger" in (file.metadata() or {})
    except SafetensorError:
        return False


def _check_settings(classes: Any, size: Any, pooling: Any, calibration: Any, about: Any, path: Path) -> None:
    """Refuse invalid header entries."""
    wrong = None
    if not (isinstance(classes, list) and classes and all(isinstance(name, str) for name in classes)):
        wrong = f"classes {classes!r:.60}"
    elif not (_are(size, int, 2) and all(0 < side <= MAX_SIDE for side in size)):
        wrong = f"size {size!r:.60}"
    elif pooling not in get_args(Pooling):
        wrong = f"pooling {pooling!r:.60}"
    elif not (_are(calibration, float, 2) and 0 < calibration[0] < float("inf") and abs(calibration[1]) < float("inf")):
        wrong = f"calibration {calibration!r:.60}"
    elif not isinstance(about, dict):
        wrong = f"about {about!r:.60}"
    if wrong:
        raise ValueError(
            f"{path} contains {wrong}, which is invalid: the file was changed or is damaged, save it again"
        )
    check_class_names(classes, path)


def _check_tensors(tensors: Mapping[str, Tensor], labels: int, path: Path) -> None:
    """Refuse tensors of other shapes or types than the classes require, and values that are not finite."""
    width = tensors["features.mean"].shape[0] if tensors.get("features.mean", torch.zeros(())).ndim == 1 else 0
    shapes: dict[str, tuple[int, ...]] = {
        "features.mean": (width,),
        "features.scale": (width,),
        "classifier.weight": (labels, width),
        "classifier.bias": (labels,),
        **{f"thresholds.{name}": (labels,) for name in Thresholds._fields},
    }
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        kind = torch.int64 if name == "thresholds.positives" else torch.float32
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != kind or not tensor.isfinite().all():
            given = "nothing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(
                f"{path} contains {given} as {name}, but finite {kind} of shape {shape} was expected: the file was "
                "changed or is damaged, save it again"
            )


def _are(values: Any, kind: type, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(type(value) is kind for value in values)


def _parts(pixels: list[Tensor]) -> list[list[Tensor]]:
    return [pixels[start : start + _BATCH] for start in range(0, len(pixels), _BATCH)]
