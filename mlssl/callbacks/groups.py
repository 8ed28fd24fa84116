"""On hundreds of devices, compare only within groups of devices, such as nodes."""

from __future__ import annotations

import lightning as L

from mlssl.distributed import group_of, world_size


class CompareWithinGroups(L.Callback):
    """Compare every anchor only with the keys of its group of devices, not with those of all devices.

    The image-aware term compares every anchor with the keys of all devices, so that its share of a step grows with
    their number; docs/devices.md says when that matters. Within a group the loss and its gradients are those of one
    device with the group's images, and the gradient is the mean over the groups. There are fewer negatives.

    Args:
        devices: Devices per group, consecutive ranks: those of one node exchange embeddings fastest.

    Raises:
        ValueError: At the start of a run, if the number of its devices is not a multiple of ``devices``.
        TypeError: At the start of a run, if the model has no ``image_aware_loss``.
    """

    def __init__(self, devices: int) -> None:
        if devices < 1:
            raise ValueError(
                f"devices={devices} was given: pass the number of devices per group, such as that of a node."
            )
        self.devices = devices

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Create the groups, on all devices together."""
        loss = getattr(pl_module, "image_aware_loss", None)
        if loss is None:
            raise TypeError(
                f"CompareWithinGroups: {type(pl_module).__name__} has no `image_aware_loss`: use MultiLabelSSLModule, "
                "or leave the callback out."
            )
        loss.group = None if self.devices == world_size() else group_of(self.devices)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Release the group; another run creates its own."""
        self._release(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Release the group if the run ends early."""
        self._release(pl_module)

    def _release(self, pl_module: L.LightningModule) -> None:
        loss = getattr(pl_module, "image_aware_loss", None)
        if loss is not None:
            loss.group = None
