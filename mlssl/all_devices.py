"""The image-aware loss of this device's anchors against the keys of all devices."""

from __future__ import annotations

import torch
from torch import Tensor

from mlssl.distributed import gather, gather_with_gradient, rank, sum_over_devices, world_size
from mlssl.losses import ImageAwareContrastiveLoss


def compare_with_all_devices(
    loss: ImageAwareContrastiveLoss,
    anchors: Tensor,
    image_ids: Tensor,
    keys: Tensor | None = None,
    key_image_ids: Tensor | None = None,
    *,
    boxes: Tensor | None = None,
    key_boxes: Tensor | None = None,
) -> Tensor:
    """Compare every anchor of this device with the keys of all devices, or of the devices in ``loss.group``.

    The sum over this device's anchors is divided by the number of anchors over all devices and multiplied by the number
    of devices, so that DDP's mean of gradients is the gradient of the global mean. Without a process group this is the
    plain loss.

    Args:
        loss: The loss with its settings.
        anchors: (R, P), need not be normalised; the same R on every device.
        image_ids: Integers (R,): the image of each anchor.
        keys: (M, P); by default the anchors, each without itself.
        key_image_ids: Integers (M,); required with ``keys``.
        boxes: (R, 4) of the anchors, if the positives use them.
        key_boxes: (M, 4); by default ``boxes`` if the anchors are the keys.

    Returns:
        Scalar in at least float32.

    Raises:
        ValueError: As for `mlssl.image_aware_contrastive_loss`.
    """
    own_index, group = None, loss.group
    if world_size(group) > 1:
        if keys is None:
            own_index = rank(group) * len(anchors) + torch.arange(len(anchors), device=anchors.device)
            keys, key_image_ids, key_boxes = anchors, image_ids, boxes
        keys = gather_with_gradient(keys, group)
        key_image_ids = None if key_image_ids is None else gather(key_image_ids, group)
        key_boxes = None if key_boxes is None else gather(key_boxes, group)
    total, count = loss(
        anchors,
        image_ids,
        keys,
        key_image_ids,
        self_index=own_index,
        boxes=boxes,
        key_boxes=key_boxes,
        reduction="sum_and_count",
    )
    mean: Tensor = total / (sum_over_devices(count, group).clamp(min=1) / world_size(group))
    return mean
