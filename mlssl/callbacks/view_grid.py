"""Draw the views that the network will train on."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from mlssl.data.decoding import BadImageError, ImageArray
from mlssl.data.records import Records
from mlssl.drawing.views import draw_view_grid
from mlssl.views.blocks import BlockViews


class ViewGridLogger(L.Callback):
    """Draw some training images with their blocks and views before epoch 0, to see what the augmentation does.

    Writes ``<default_root_dir>/views/image-<id>.png`` and logs the pictures to Weights & Biases and TensorBoard. The
    images are evenly spaced over the training set, and their views come from a separate random generator. Needs a
    datamodule with ``train_records`` and ``views``, such as `MultiLabelDataModule`; otherwise one line says that
    nothing is drawn.

    Args:
        num_images: At least 1; limited to the size of the training set.
        seed: Seed of the views.
        channels: Channels drawn as red, green and blue, for images with three or more.

    Raises:
        ValueError: If num_images is below 1.
    """

    def __init__(self, num_images: int = 4, seed: int = 0, channels: tuple[int, int, int] = (0, 1, 2)) -> None:
        if num_images < 1:
            raise ValueError(f"num_images={num_images} was given: pass at least 1, or leave ViewGridLogger out.")
        self.num_images = num_images
        self.seed = seed
        self.channels = channels

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw, unless the run resumes at a later epoch."""
        if not trainer.is_global_zero or trainer.current_epoch > 0:
            return
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        records, views = getattr(datamodule, "train_records", None), getattr(datamodule, "views", None)
        if not isinstance(records, Records) or not isinstance(views, BlockViews):
            rank_zero_info("ViewGridLogger: nothing is drawn: the run has no datamodule with train_records and views.")
            return
        folder = Path(trainer.default_root_dir) / "views"
        for index in np.unique(np.linspace(0, len(records) - 1, self.num_images).round().astype(int)):
            name = f"image-{records.image_ids[index]}"
            try:
                image = records.image(index)
            except BadImageError:
                if getattr(datamodule, "hparams", {}).get("on_bad_image") == "skip":
                    continue
                raise
            drawn = views.arrays(image, np.random.default_rng([self.seed, index]))
            picture = draw_view_grid(
                image,
                drawn["views"],
                views.boxes(*image.shape[:2]),
                folder / f"{name}.png",
                records.path(index).name,
                self.channels,
                drawn.get("local_views"),
            )
            for logger in trainer.loggers:
                _log_picture(logger, f"views/{name}", picture, trainer.global_step)


def _log_picture(logger: Any, name: str, picture: ImageArray, step: int) -> None:
    if isinstance(logger, WandbLogger):
        logger.log_image(name, [picture], step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, picture, step, dataformats="HWC")
