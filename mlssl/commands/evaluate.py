"""`mlssl linear`: how good backbones are, in one table."""

from __future__ import annotations

import pickle
from pathlib import Path

import lightning as L
from torch import nn

from mlssl.backbones import Pooling
from mlssl.data.datamodule import DatasetName, MultiLabelDataModule
from mlssl.evaluation.features import extract_features
from mlssl.evaluation.probe import LinearProbeResult, linear_probe
from mlssl.module import MultiLabelSSLModule


def linear(
    sources: list[str],
    dataset: DatasetName = "synthetic",
    root: str | None = None,
    eval_size: int | tuple[int, int] = 224,
    min_images_per_class: tuple[int, int] | None = None,
    train_split: str | None = None,
    val_split: str | None = None,
    pooling: Pooling = "avgmax",
    batch_size: int = 64,
    num_workers: int | None = None,
    seed: int = 0,
) -> None:
    """Compare backbones by a linear probe on their frozen features of whole images.

    Example: mlssl linear last.ckpt resnet18 --dataset corel5k --root FOLDER

    Args:
        sources: Checkpoints of `mlssl fit`, or names of backbones, which are then untrained.
        dataset: Format of `root`.
        root: Folder that holds the images.
        eval_size: Height and width, or one side, that whole images are resized to.
        min_images_per_class: Keep only classes with at least so many train and so many val images.
        train_split: Split to learn from; the format's training split by default.
        val_split: Split to test on; the format's val or test split by default.
        pooling: Over the last feature map: avg, max or their mean.
        batch_size: Images a step.
        num_workers: Loader processes.
        seed: Of untrained weights and of the split that chooses the regularisation.
    """
    data = MultiLabelDataModule(
        dataset,
        root,
        batch_size=batch_size,
        eval_size=eval_size,
        num_workers=num_workers,
        train_split=train_split,
        val_split=val_split,
        min_images_per_class=min_images_per_class,
    )
    data.setup()
    models = [(source, _model(source, seed)) for source in sources]
    width = max(len(source) for source in sources)
    for source, model in models:
        result = probe(model, data, pooling, seed)
        print(f"{source:{width}}  mAP {result.mAP:.4f}  {result.num_classes} classes  strength {result.strength:g}")


def probe(model: nn.Module, data: MultiLabelDataModule, pooling: Pooling, seed: int = 0) -> LinearProbeResult:
    """Linear probe on the frozen features of the whole images of a data module."""
    train, test = (
        extract_features(model, data.image_dataloader(split), pooling=pooling, progress=True)
        for split in ("train", "val")
    )
    return linear_probe(train, test, seed=seed)


def _model(source: str, seed: int) -> nn.Module:
    if Path(source).suffix == ".ckpt" or Path(source).is_file():
        try:
            return MultiLabelSSLModule.load_from_checkpoint(source, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"{source} does not load as a checkpoint of MultiLabelSSLModule: pass one that mlssl fit wrote, or the "
                "name of a backbone."
            ) from error
    L.seed_everything(seed, verbose=False)
    return MultiLabelSSLModule(source)
