"""Extract the frozen features of a backbone on a set of images, the input of every probe."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler, Subset

from mlssl.backbones import check_image_size
from mlssl.bars import progress_bar
from mlssl.choices import Pooling
from mlssl.contracts import FeatureNetwork
from mlssl.data.batches import check_image_batch
from mlssl.data.records import Records
from mlssl.evaluation.cache import FeatureCache, cache_lock
from mlssl.evaluation.metrics import first_indices
from mlssl.feature_maps import pooled_features, same_features
from mlssl.modes import eval_mode
from mlssl.out_of_memory import InParts


class Features(NamedTuple):
    """Features of a set of images, one row per image, on the CPU.

    `features` is (n, D) float32 or float16, `labels` (n, L) int8 of 1 present, 0 absent, −1 unknown, or None for an
    unlabelled set, `image_ids` (n,) int64 without duplicates.
    """

    features: Tensor
    labels: Tensor | None
    image_ids: Tensor


def extract_features(
    model: FeatureNetwork,
    loader: Iterable[Mapping[str, Tensor]],
    *,
    pooling: Pooling = "avg",
    dtype: torch.dtype = torch.float32,
    cache: str | os.PathLike[str] | None = None,
    progress: bool | str = False,
) -> Features:
    """Features of every image of a loader, in one pass of the frozen backbone in eval mode and float32.

    The training flags of the backbone's modules are restored afterwards, and its buffers (batch-norm statistics) are
    checked to be unchanged. A repeated image, such as a distributed sampler's padding, is kept once.

    Args:
        model: `MultiLabelSSLModule`, or any object with `backbone`, a network from normalised images to features, and
            `normalize`, a function from uint8 images (n, 3, H, W) to the backbone's input.
        loader: Batches as `mlssl.data.batches.ImageBatch`, labels in all of them or in none; the size of the images may
            differ from one batch to the next.
        pooling: Of the last feature map: average, maximum, or the mean of both (as in published linear evaluation).
        dtype: Type of the stored features: float32, or float16 in half the memory.
        cache: Folder for features on disk, see `FeatureCache`: the result is then memory-mapped and read on demand, a
            stopped pass resumes, a finished one is not repeated, and a second process waits for the first. Needs a
            `DataLoader` that is not shuffled. Only the first and the last image are compared with an earlier pass.
        progress: Whether to show a bar with images per second and the time left, or its label after "features", such as
            "untrained, train".

    Returns:
        Features in the order of the loader.

    Raises:
        TypeError: If `model` lacks `backbone` or `normalize`, or a batch or `dtype` has an unsupported type.
        ValueError: If the loader is empty, a batch is not as above, the backbone does not support the image size, a
            feature is not finite, or the cache has other features, is damaged, or the loader has no fixed order.
        RuntimeError: If a buffer of the model changed during the pass.
        OSError: If the cache cannot be written.
    """
    backbone = getattr(model, "backbone", None)
    normalize = getattr(model, "normalize", None)
    if not isinstance(backbone, nn.Module) or not callable(normalize):
        raise TypeError(
            f"{type(model).__name__} has no `backbone` network and `normalize` function: "
            "pass a MultiLabelSSLModule or an object with both"
        )
    if dtype not in (torch.float32, torch.float16):
        raise TypeError(f"dtype={dtype} was given: pass torch.float32 or torch.float16")
    if cache is None:
        return _pass(model, loader, _Memory(), pooling, dtype, progress)
    ordered = _require_fixed_order(loader)
    with cache_lock(cache):
        store = _open_cache(cache, backbone, normalize, ordered, pooling, dtype)
        return _pass(model, _skip_first(ordered, store.done), store, pooling, dtype, progress)


def _pass(
    model: FeatureNetwork,
    loader: Iterable[Mapping[str, Tensor]],
    store: _Memory | FeatureCache,
    pooling: Pooling,
    dtype: torch.dtype,
    progress: bool | str,
) -> Features:
    """Append the features of the loader's images to the store."""
    backbone, normalize = model.backbone, model.normalize
    images = getattr(loader, "dataset", None)
    total = store.done + len(images) if isinstance(images, Sized) else None
    owner = model if isinstance(model, nn.Module) else backbone
    before = {name: buffer.clone() for name, buffer in owner.named_buffers()}
    num_labels, num_batches, num_labelled = None, 0, 0
    title = f"features, {progress}" if isinstance(progress, str) else "features"
    in_parts = InParts()
    with (
        eval_mode(backbone),
        progress_bar(total=total, initial=store.done, disable=not progress, unit=" images", desc=title) as bar,
    ):
        for batch in loader:
            check_image_batch(batch, num_labels)
            labels = batch.get("labels")
            num_labels = None if labels is None else labels.shape[1]
            num_batches, num_labelled = num_batches + 1, num_labelled + (labels is not None)
            if num_labelled not in (0, num_batches):
                raise ValueError(
                    f'{num_labelled} of the first {num_batches} batches have "labels": pass them in all or in none'
                )
            try:
                features = in_parts(lambda part: image_features(backbone, normalize, part, pooling), batch["image"])
            except (RuntimeError, AssertionError):
                check_image_size(backbone, *batch["image"].shape[-2:])  # raises a clearer error if the size is wrong
                raise
            store.append(
                _stored(features, dtype, batch["image_ids"]),
                batch["image_ids"].cpu(),
                None if labels is None else labels.to("cpu", torch.int8),
            )
            bar.update(len(batch["image"]))
    changed = [name for name, buffer in owner.named_buffers() if not _identical(before[name], buffer)]
    if changed:
        raise RuntimeError(
            f"buffer {changed[0]} changed while features were taken in eval mode: "
            "the backbone updates it whatever its mode, so its features depend on the order of the images"
        )
    if not store.done:
        raise ValueError("the loader returned no batch: check the split and drop_last")
    return _unique(*store.read())


def image_features(
    backbone: nn.Module, normalize: Callable[[Tensor], Tensor], images: Tensor, pooling: Pooling = "avg"
) -> Tensor:
    """Features (n, D) float32 of uint8 images (n, 3, H, W), on the backbone's device, without autocast."""
    parameter = next(backbone.parameters(), images)
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    with torch.autocast(parameter.device.type, enabled=False):
        normalized = normalize(images.to(parameter.device, non_blocking=True)).to(dtype)
        features: Tensor = pooled_features(backbone, normalized, pooling=pooling)
        return features.float()


class _Memory:
    """Features, ids and labels of batches, in memory."""

    def __init__(self) -> None:
        self.done = 0
        self._batches: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def append(self, features: Tensor, image_ids: Tensor, labels: Tensor | None) -> None:
        self._batches.append((features, image_ids, labels))
        self.done += len(features)

    def read(self) -> tuple[Tensor, Tensor, Tensor | None]:
        features, image_ids, labels = zip(*self._batches, strict=True)
        return torch.cat(features), torch.cat(image_ids), None if labels[0] is None else torch.cat(labels)


def _require_fixed_order(loader: Iterable[Mapping[str, Tensor]]) -> DataLoader[Any]:
    """The loader, if every pass over it returns the same images in the same order."""
    if not isinstance(loader, DataLoader) or not isinstance(loader.sampler, SequentialSampler):
        raise ValueError(
            f"a cache needs images in a fixed order, which this {type(loader).__name__} may not have: "
            "pass a torch DataLoader without shuffle or sampler, or leave the cache out"
        )
    return loader


def _open_cache(
    folder: str | os.PathLike[str],
    backbone: nn.Module,
    normalize: Callable[[Tensor], Tensor],
    loader: DataLoader[Any],
    pooling: Pooling,
    dtype: torch.dtype,
) -> FeatureCache:
    """The cache, if its first and last features equal the backbone's features of those images."""
    images = cast(Any, loader.dataset)
    made_with = {"weights": _digest(backbone), "pooling": pooling, "dtype": str(dtype).removeprefix("torch.")}
    records = getattr(images, "records", None)
    if records is not None:  # the same images may have labels that are read in another way
        made_with["labels"] = _digest_of_labels(records)
    cache = FeatureCache(folder, len(images), made_with)
    for index in sorted({0, cache.done - 1} if cache.done else set()):
        with eval_mode(backbone):
            now = image_features(backbone, normalize, images[index]["image"][None], pooling)[0].cpu()
        then = cache.row(index).float()
        if not same_features(now, then):
            raise ValueError(
                f"the features in {cache.folder} are not those of these images, image {index} differs: "
                "pass another folder, or remove that one"
            )
    return cache


def _digest_of_labels(records: Records) -> str:
    """Digest of ids, classes and labels, in order."""
    digest = hashlib.sha256(repr((records.classes, records.image_ids.tolist())).encode())
    digest.update(b"" if records.labels is None else records.labels.tobytes())
    return digest.hexdigest()[:16]


def _digest(network: nn.Module) -> str:
    """Digest of all weights and buffers: equal only for networks with the same features."""
    digest = hashlib.sha256(type(network).__name__.encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _skip_first(loader: DataLoader[Any], count: int) -> DataLoader[Any]:
    """A loader that skips the first `count` images without reading them."""
    if count == 0:
        return loader
    rest = range(count, len(cast(Sized, loader.dataset)))
    names = ("batch_size", "num_workers", "collate_fn", "pin_memory", "worker_init_fn", "generator")
    return DataLoader(Subset(loader.dataset, rest), **{name: getattr(loader, name) for name in names})


def _stored(features: Tensor, dtype: torch.dtype, image_ids: Tensor) -> Tensor:
    kept = features.to("cpu", dtype)
    wrong = ~kept.isfinite().all(dim=1)
    if wrong.any():
        image_id = image_ids.cpu()[wrong][0].item()
        if features.isfinite().all():
            raise ValueError(
                f"features of image {image_id} reach {features.abs().max():.3g}, too large for float16: use float32"
            )
        raise ValueError(
            f"features of image {image_id} contain NaN or infinity: check the backbone's weights and its input images"
        )
    return kept


def _unique(features: Tensor, image_ids: Tensor, labels: Tensor | None) -> Features:
    keep = first_indices(image_ids)
    if len(keep) < len(image_ids):
        features, image_ids = features[keep], image_ids[keep]
        labels = None if labels is None else labels[keep]
    return Features(features, labels, image_ids)


def _identical(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and bool(((left == right) | ((left != left) & (right != right))).all())
