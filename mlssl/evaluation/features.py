"""One frozen pass of a backbone over a set of images: the features that every probe starts from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mlssl.backbones import Pooling, pooled_features
from mlssl.data.records import check_image_batch
from mlssl.evaluation.metrics import first_places


class Features(NamedTuple):
    """Features of a set of images, one line an image, on the CPU.

    `features` is (n, D) float32, `labels` (n, L) int8 of 1 present, 0 absent, −1 unknown, or None for an unlabelled
    set, `image_ids` (n,) int64 without duplicates.
    """

    features: Tensor
    labels: Tensor | None
    image_ids: Tensor


def extract_features(
    model: Any, loader: Iterable[Mapping[str, Tensor]], *, pooling: Pooling = "avg", progress: bool = False
) -> Features:
    """Features of every image of a loader, by one pass of the frozen backbone in eval mode and float32.

    The training flags of the backbone's modules are as before afterwards, and its buffers (batch-norm statistics) are
    checked to be unchanged. An image that comes twice, as a distributed sampler's padding does, is kept once.

    Args:
        model: `MultiLabelSSLModule`, or any object with `backbone`, a network from normalised images to features, and
            `normalize`, a function from uint8 images (n, 3, H, W) to what the backbone takes.
        loader: Batches as `mlssl.data.records.ImageBatch`, labels in all of them or in none; the size of the images may
            differ from one batch to the next.
        pooling: Over the last feature map: average, maximum, or the mean of both (as in published linear evaluation).
        progress: Whether to show a bar with images a second.

    Returns:
        Features in the order of the loader.

    Raises:
        TypeError: If `model` lacks `backbone` or `normalize`, or a batch holds another kind of number.
        ValueError: If the loader is empty, a batch is not as above, or a feature is not finite.
        RuntimeError: If a buffer of the model changed during the pass.
    """
    backbone = getattr(model, "backbone", None)
    normalize = getattr(model, "normalize", None)
    if not isinstance(backbone, nn.Module) or not callable(normalize):
        raise TypeError(
            f"{type(model).__name__} has no `backbone` network and `normalize` function: "
            "give a MultiLabelSSLModule or an object with both"
        )
    owner = model if isinstance(model, nn.Module) else backbone
    before = {name: buffer.clone() for name, buffer in owner.named_buffers()}
    batches: list[Mapping[str, Tensor]] = []
    num_labels = None
    images = getattr(loader, "dataset", None)
    total = len(images) if isinstance(images, Sized) else None
    with eval_mode(backbone), tqdm(total=total, disable=not progress, unit=" images", desc="features") as bar:
        for batch in loader:
            check_image_batch(batch, num_labels)
            num_labels = batch["labels"].shape[1] if "labels" in batch else None
            batches.append(
                {
                    "features": image_features(backbone, normalize, batch["image"], pooling).cpu(),
                    **{key: batch[key].cpu() for key in ("image_ids", "labels") if key in batch},
                }
            )
            bar.update(len(batch["image"]))
    changed = [name for name, buffer in owner.named_buffers() if not _identical(before[name], buffer)]
    if changed:
        raise RuntimeError(
            f"buffer {changed[0]} changed while features were taken in eval mode: "
            "the backbone updates it whatever its mode, so its features depend on the order of the images"
        )
    return _gather(batches)


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Run without gradients and with every module of `network` in eval mode; each training flag comes back after."""
    flags = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def image_features(backbone: nn.Module, normalize: Any, images: Tensor, pooling: Pooling = "avg") -> Tensor:
    """Features (n, D) float32 of uint8 images (n, 3, H, W), on the backbone's device, without autocast."""
    parameter = next(backbone.parameters(), images)
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    with torch.autocast(parameter.device.type, enabled=False):
        normalized = normalize(images.to(parameter.device, non_blocking=True)).to(dtype)
        features: Tensor = pooled_features(backbone, normalized, pooling=pooling)
        return features.float()


def _gather(batches: list[Mapping[str, Tensor]]) -> Features:
    if not batches:
        raise ValueError("the loader gave no batch, so there are no features: check the split and drop_last")
    labelled = ["labels" in batch for batch in batches]
    if any(labelled) != all(labelled):
        raise ValueError(
            f'{sum(labelled)} of {len(batches)} batches have "labels": give them in all batches or in none'
        )
    features = torch.cat([batch["features"] for batch in batches])
    image_ids = torch.cat([batch["image_ids"] for batch in batches]).long()
    labels = torch.cat([batch["labels"].to(torch.int8) for batch in batches]) if all(labelled) else None
    if not features.isfinite().all():
        raise ValueError("features hold NaN or infinity: the backbone's weights or its input images are broken")
    keep = first_places(image_ids)
    if len(keep) < len(image_ids):
        features, image_ids = features[keep], image_ids[keep]
        labels = None if labels is None else labels[keep]
    return Features(features, labels, image_ids)


def _identical(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and bool(((left == right) | ((left != left) & (right != right))).all())
