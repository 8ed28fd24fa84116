"""The training and evaluation batches of the module, and checks of their contract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

VIEW_BATCH_CONTRACT = """A training batch is a mapping with
  "views":     uint8 (B, A, K, C, S, S), A branches, K blocks of each image, S × S pixels
  "image_ids": int64 (B,), no id twice
and optionally
  "boxes":       float32 (B, A, K, 4): top, left, height, width of a view, as fractions of the image
  "local_views": uint8 (B, V, C, s, s), V small views of each image
  "local_boxes": float32 (B, V, 4), likewise
  "labels":      bool or integer (B, L): 1 present, 0 absent, -1 unknown"""

IMAGE_BATCH_CONTRACT = """An evaluation batch is a mapping with
  "image":     uint8 (B, C, H, W), whole images of one size
  "image_ids": int64 (B,), no id twice
  "labels":    bool or integer (B, L), optional: 1 present, 0 absent, -1 unknown"""

_SLACK = 1e-4
"""Tolerance for boxes that end above 1: float32 rounding. Lower precisions get their own epsilon."""


class _LabelledBatch(TypedDict, total=False):
    labels: Tensor  # bool or integer (B, L)


class _OptionalViews(_LabelledBatch, total=False):
    boxes: Tensor  # float32 (B, A, K, 4)
    local_views: Tensor  # uint8 (B, V, C, s, s)
    local_boxes: Tensor  # float32 (B, V, 4)


class ViewBatch(_OptionalViews):
    """Batch of a training step; `labels` (B, L) only if the images are labelled.

    The module decides which number of branches A it needs.
    """

    views: Tensor  # uint8 (B, A, K, C, S, S)
    image_ids: Tensor  # int64 (B,)


class ImageBatch(_LabelledBatch):
    """Batch of an evaluation step; `labels` (B, L) only if the images are labelled."""

    image: Tensor  # uint8 (B, C, H, W)
    image_ids: Tensor  # int64 (B,)


def check_view_batch(batch: object, num_labels: int | None = None) -> None:
    """Check a training batch against the contract; every message ends with it. Meant for the first batch of a run.

    Args:
        batch: Mapping as in `VIEW_BATCH_CONTRACT`; other keys are ignored.
        num_labels: Expected L of the labels, if any. None: any L.

    Raises:
        TypeError: Not a mapping, not a tensor, or a tensor of another dtype.
        ValueError: A key is missing, a shape is wrong, ids repeat, boxes lie outside 0–1, or a label is not 1, 0 or −1.
    """
    contract = VIEW_BATCH_CONTRACT
    views = _check(batch, "views", contract, num_labels)
    assert isinstance(batch, Mapping)
    _check_boxes(batch, "boxes", (*views.shape[:3], 4), contract)
    local_views = batch.get("local_views")
    if local_views is None:
        if batch.get("local_boxes") is not None:
            raise ValueError(f"'local_boxes' came without 'local_views'. {contract}")
        return
    if not isinstance(local_views, Tensor) or local_views.dtype != torch.uint8:
        raise TypeError(f"'local_views' is {_describe(local_views)}, not uint8. {contract}")
    shape = local_views.shape
    if len(shape) != 5 or (shape[0], shape[2]) != (views.shape[0], views.shape[3]) or shape[3] != shape[4]:
        raise ValueError(f"'local_views' has shape {tuple(shape)} where 'views' has {tuple(views.shape)}. {contract}")
    if local_views.numel() == 0:
        raise ValueError(f"'local_views' has shape {tuple(shape)}, which is empty. {contract}")
    _check_boxes(batch, "local_boxes", (*shape[:2], 4), contract)


def check_image_batch(batch: object, num_labels: int | None = None) -> None:
    """Check an evaluation batch against the contract; every message ends with it. Meant for the first batch of a run.

    Args:
        batch: Mapping as in `IMAGE_BATCH_CONTRACT`; other keys are ignored.
        num_labels: Expected L of the labels, if any. None: any L.

    Raises:
        TypeError: Not a mapping, not a tensor, or a tensor of another dtype.
        ValueError: A key is missing, a shape is wrong, ids repeat, or a label is not 1, 0 or −1.
    """
    _check(batch, "image", IMAGE_BATCH_CONTRACT, num_labels)


def _check(batch: object, key: str, contract: str, num_labels: int | None) -> Tensor:
    """Checks shared by both kinds of batch; returns the pixels."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch of type {type(batch).__name__} was given. {contract}")
    missing = [name for name in (key, "image_ids") if name not in batch]
    if missing:
        raise ValueError(f"the batch has the keys {sorted(map(str, batch))} and lacks {missing}. {contract}")
    pixels, image_ids, labels = batch[key], batch["image_ids"], batch.get("labels")
    if not isinstance(pixels, Tensor) or pixels.dtype != torch.uint8:
        raise TypeError(f"{key!r} is {_describe(pixels)}, not uint8. {contract}")
    if not _is_batch_of_views(pixels) if key == "views" else pixels.ndim != 4:
        raise ValueError(f"{key!r} has shape {tuple(pixels.shape)}. {contract}")
    if pixels.numel() == 0:
        raise ValueError(f"{key!r} has shape {tuple(pixels.shape)}, which is empty. {contract}")
    if not isinstance(image_ids, Tensor) or image_ids.dtype != torch.int64:
        raise TypeError(f"'image_ids' is {_describe(image_ids)}, not int64. {contract}")
    if image_ids.shape != pixels.shape[:1]:
        raise ValueError(f"'image_ids' has shape {tuple(image_ids.shape)} for {len(pixels)} images. {contract}")
    repeated = len(image_ids) - len(set(image_ids.tolist()))
    if repeated:
        raise ValueError(f"'image_ids' repeats {repeated} of {len(image_ids)} ids. {contract}")
    if labels is not None:
        _check_batch_labels(labels, len(pixels), num_labels, contract)
    return pixels


def _is_batch_of_views(views: Tensor) -> bool:
    return views.ndim == 6 and views.shape[4] == views.shape[5]


def _check_boxes(batch: Mapping[Any, Any], key: str, shape: tuple[int, ...], contract: str) -> None:
    boxes = batch.get(key)
    if boxes is None:
        return
    if not isinstance(boxes, Tensor) or not boxes.is_floating_point():  # Lightning casts a batch to the run's precision
        raise TypeError(f"{key!r} is {_describe(boxes)}, not float32. {contract}")
    if boxes.shape != shape:
        raise ValueError(f"{key!r} has shape {tuple(boxes.shape)} where {shape} was expected. {contract}")
    slack, boxes = max(_SLACK, torch.finfo(boxes.dtype).eps), boxes.float()
    ends = boxes[..., :2] + boxes[..., 2:]
    # Written so that NaN counts as outside.
    inside = bool((boxes[..., :2] >= 0).all() and (boxes[..., 2:] > 0).all() and (ends <= 1 + slack).all())
    if not inside:
        raise ValueError(f"{key!r} has boxes outside 0-1 or without area. {contract}")


def _check_batch_labels(labels: object, num_images: int, num_labels: int | None, contract: str) -> None:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"'labels' is {_describe(labels)}, neither bool nor integer. {contract}")
    if labels.ndim != 2 or len(labels) != num_images or labels.shape[1] == 0:
        raise ValueError(f"'labels' has shape {tuple(labels.shape)} for {num_images} images. {contract}")
    if num_labels is not None and labels.shape[1] != num_labels:
        raise ValueError(f"'labels' has {labels.shape[1]} columns where L = {num_labels} was expected. {contract}")
    other = sorted(set(labels.flatten().tolist()) - {1, 0, -1})
    if other:
        raise ValueError(f"'labels' contains {other[0]}{' and others' if other[1:] else ''}. {contract}")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"Tensor of {value.dtype} and shape {tuple(value.shape)}"
    return f"of type {type(value).__name__}"
