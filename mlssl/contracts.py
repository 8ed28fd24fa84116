"""What evaluation and callbacks ask of the objects that they are given, as Protocols: no base class is needed."""

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
        """Images uint8 (n, C, H, W) to what the backbone takes."""
        ...


@runtime_checkable
class EvaluationData(Protocol):
    """A datamodule that callbacks can evaluate on, such as `MultiLabelDataModule`."""

    train_records: Records | None
    """What is trained on, from `setup` on."""
    val_records: Records | None
    """What is evaluated on; None for nothing."""
    probe_records: Records | None
    """Labelled images that the probe learns from; None for those that are trained on."""
    views: BlockViews
    """How views are made."""
    eval_size: tuple[int, int]
    """Height and width that whole images are resized to."""

    def image_dataloader(self, split: Literal["train", "val"]) -> DataLoader[Any]:
        """Whole images of a set, all of them on every device, see `mlssl.data.batches.ImageBatch`."""
        ...

    def probe_dataloader(self) -> DataLoader[Any] | None:
        """Whole images of ``probe_records``, all of them on every device, in an order of the epoch; None without."""
        ...
