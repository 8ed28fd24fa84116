"""Change the size of the views during a run."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from mlssl.backbones import check_image_size
from mlssl.data.datasets import EpochSampler, ViewDataset


class ViewSize(L.Callback):
    """Change the size of the views at the start of given epochs, such as from small to large.

    The number of views per step and the learning rate stay the same. A resumed run uses the size of its epoch. Every
    branch must be a `Recipe`, which the library renders at any size. Local views keep their size.

    Args:
        sizes: Side in pixels from an epoch on, epochs counted from 0: ``{0: 48, 60: 80}`` trains on views of 48 × 48
            in the epochs 0 to 59, and of 80 × 80 in all later ones. Before the first named epoch, the size is the
            datamodule's.

    Raises:
        ValueError: If no size is given, or an epoch is below 0; before training, if the train loader is not that of
            a `MultiLabelDataModule`, a branch is not a `Recipe`, or views or backbone do not support a size.
    """

    def __init__(self, sizes: dict[int, int]) -> None:
        if not isinstance(sizes, Mapping) or not sizes or not all(int(epoch) >= 0 for epoch in sizes):
            raise ValueError(
                f"sizes={sizes!r} was given: pass a mapping from epochs, counted from 0, to sides in pixels, such as "
                "{0: 48, 60: 80}."
            )
        self.sizes = {int(epoch): int(size) for epoch, size in sorted(sizes.items())}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check every size before the first step, and set the size of the current epoch."""
        loader = trainer.train_dataloader
        dataset, sampler = getattr(loader, "dataset", None), getattr(loader, "sampler", None)
        if not isinstance(dataset, ViewDataset) or not isinstance(sampler, EpochSampler):
            raise ValueError(
                f"ViewSize needs the train loader of a MultiLabelDataModule, but it is a {type(loader).__name__}: use "
                "MultiLabelDataModule, or leave ViewSize out."
            )
        for size in self.sizes.values():
            dataset.views.with_size(size)
            check_image_size(pl_module.backbone, size, size)  # type: ignore[arg-type]
        self._set_size(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the size of the epoch before its first views are made."""
        self._set_size(trainer)

    def _set_size(self, trainer: L.Trainer) -> None:
        sampler: Any = trainer.train_dataloader.sampler  # type: ignore[union-attr]
        size = next((self.sizes[epoch] for epoch in reversed(self.sizes) if epoch <= trainer.current_epoch), None)
        if size != sampler.view_size:
            sampler.view_size = size
            rank_zero_info(f"ViewSize: views of {size} × {size} pixels from epoch {trainer.current_epoch}")
