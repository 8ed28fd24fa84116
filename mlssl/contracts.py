"""Requirements of evaluation and callbacks on their arguments, as Protocols: no base class is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from mlssl.data.records import Records
    from mlssl.views.blocks import BlockViews


class FeatureNetwork(Protocol):
    """An object with a network and its normalisation, such as `MultiLabelSSLModule` or an opened backbone."""

    backbone: nn.Module
    """From normalised images (n, C, H, W) to features (n, D)."""

    def normalize(self, images: Tensor) -> Tensor:
        """Images uint8 (n, C, H, W) to the backbone's input."""
        ...


@runtime_checkable
class EvaluationData(Protocol):
    """A datamodule that callbacks can evaluate on, such as `MultiLabelDataModule`."""

    train_records: Records | None
    """Training images, available after `setup`."""
    val_records: Records | None
    """Validation images; None for none."""
    probe_records: Records | None
    """Labelled images to train the probe on; None for the training images."""
    views: BlockViews
    """Augmentation that makes the views."""
    eval_size: tuple[int, int]
    """Height and width to which whole images are resized."""

    def image_dataloader(self, split: Literal["train", "val"]) -> DataLoader[Any]:
        """Whole images of a set, all of them on every device, see `mlssl.data.batches.ImageBatch`."""
        ...

    def probe_dataloader(self) -> DataLoader[Any] | None:
        """Whole images of ``probe_records``, all of them on every device, in an order of the epoch; None without."""
        ...
