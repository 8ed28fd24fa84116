"""Check the module's inputs: numbers at construction, and a batch on the first step of an epoch."""

from __future__ import annotations

from torch import Tensor, nn

from mlssl.backbones import check_image_size
from mlssl.data.batches import ImageBatch, ViewBatch, check_image_batch, check_view_batch
from mlssl.distributed import world_size
from mlssl.layers import depth_of_parameters


def check_at_least(least: int, **settings: float | None) -> None:
    """Refuse numbers below `least`; None is accepted.

    Raises:
        ValueError: Names the first one.
    """
    for name, value in settings.items():
        if value is not None and not value >= least:
            raise ValueError(f"{name}={value} was given: pass a number of at least {least}.")


def check_layers(
    backbone: nn.Module, layer_decay: float | None, frozen_stages: int, frozen_epochs: int, backbone_lr_scale: float
) -> None:
    """Refuse invalid settings of a backbone's layers.

    Raises:
        ValueError: A number is out of range, epochs are given without frozen stages, or a layer decay is given for a
            network that does not define its layers.
    """
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(
            f"layer_decay={layer_decay} was given: pass a factor above 0 and at most 1, such as 0.75, or None."
        )
    check_at_least(0, frozen_stages=frozen_stages, frozen_epochs=frozen_epochs, backbone_lr_scale=backbone_lr_scale)
    if frozen_epochs and not frozen_stages:
        raise ValueError(
            f"frozen_epochs={frozen_epochs} was given, but no stage is frozen: pass frozen_stages of at least 1 too."
        )
    if layer_decay is not None:
        depth_of_parameters(backbone)


def check_pixels(mean: list[float], std: list[float]) -> None:
    """Refuse mean and standard deviation that do not match.

    Raises:
        ValueError: They differ in length, or a standard deviation is not above 0.
    """
    if len(mean) != len(std) or not min(std) > 0:
        raise ValueError(f"mean={mean} and std={std} do not match: pass one number per channel in each, std above 0.")


def check_channels(images: Tensor, channels: int) -> None:
    """Refuse images (n, C, H, W) whose channels do not match the backbone.

    Raises:
        ValueError: Names what to pass instead.
    """
    if images.shape[1] != channels:
        raise ValueError(
            f"The images have {images.shape[1]} channels, but the backbone takes {channels}: pass "
            f"backbone_kwargs={{'in_chans': {images.shape[1]}}} (--model.backbone_kwargs.in_chans), with mean and "
            "std of as many numbers if they are given, or decode the images to as many channels."
        )


def check_step(backbone: nn.Module, batch: ViewBatch, *, takes_local_views: bool, is_first: bool) -> None:
    """Refuse a batch that violates the contract or cannot be trained on.

    Args:
        backbone: Network from normalised images to features.
        batch: Batch of one device.
        takes_local_views: Whether the loss uses ``local_views``.
        is_first: Whether this is the first step of a run, which also checks that the backbone accepts the size.

    Raises:
        TypeError: An entry has the wrong type, see `check_view_batch`.
        ValueError: A shape or value is wrong, there is only one image over all devices, local views are not used, or
            the backbone does not accept the size of the views.
    """
    check_view_batch(batch)
    if len(batch["views"]) * world_size() < 2:
        raise ValueError(
            f"A step has {len(batch['views'])} image over all devices, but no other image to compare it with: use a "
            "batch_size of at least 2."
        )
    if "local_views" in batch and not takes_local_views:
        raise ValueError(
            "The batch has local views, but the loss of MultiLabelSSLModule uses none: leave local_views out "
            "(--data.local_views), or override terms in a class that embeds them."
        )
    if is_first:
        check_image_size(backbone, *batch["views"].shape[-2:])


def check_images(backbone: nn.Module, batch: ImageBatch, batch_idx: int, is_first: bool) -> None:
    """Check the first batch of whole images of an epoch, and once that the backbone accepts their size.

    Raises:
        ValueError: As `check_image_batch` and `check_image_size`.
        TypeError: As `check_image_batch`.
    """
    if batch_idx == 0:
        check_image_batch(batch)
    if batch_idx == 0 and is_first:
        check_image_size(backbone, *batch["image"].shape[-2:])
