"""On hundreds of devices: compare with the keys of a group of them, such as one node."""

from __future__ import annotations

import lightning as L

from mlssl.distributed import group_of, world_size


class CompareWithinGroups(L.Callback):
    """Compare every anchor with the keys of its group of devices alone, rather than with those of all.

    The image-aware term compares every anchor with the keys of all devices, so that its share of a step grows with
    their number; docs/devices.md says from where on that matters. Within a group the loss and its gradients are those
    of one device with the group's images, and the gradient is the mean over the groups. Fewer negatives are met.

    Args:
        devices: Devices per group, consecutive ranks: those of one node exchange embeddings fastest.

    Raises:
        ValueError: At the start of a run, if the number of its devices is not a multiple of ``devices``.
        TypeError: Then, if the model has no ``image_aware_loss``.
    """

    def __init__(self, devices: int) -> None:
        if devices < 1:
            raise ValueError(f"devices={devices} was given: pass the devices per group, such as those of one node.")
        self.devices = devices

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Form the groups, on all devices together."""
        loss = getattr(pl_module, "image_aware_loss", None)
        if loss is None:
            raise TypeError(
                f"CompareWithinGroups: {type(pl_module).__name__} has no `image_aware_loss`: use MultiLabelSSLModule, "
                "or leave the callback out."
            )
        loss.group = None if self.devices == world_size() else group_of(self.devices)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Release the group; another run forms its own."""
        self._let_go(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Release the group if the run ends early."""
        self._let_go(pl_module)

    def _let_go(self, pl_module: L.LightningModule) -> None:
        loss = getattr(pl_module, "image_aware_loss", None)
        if loss is not None:
            loss.group = None
