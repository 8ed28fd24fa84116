"""Data sets, batches, a small module and a quiet Trainer that the tests of the module share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mlssl.module import MultiLabelSSLModule

B, A, K, P, S, LABELS = 4, 2, 3, 16, 32, 5
"""Images, branches, blocks, projection width, side of a view and labels of these tests."""


class Views(Dataset[dict[str, Any]]):
    """A custom data set: views, ids and labels of `num` images, sampled by index."""

    num_blocks = K

    def __init__(self, num: int = 2 * B, channels: int = 3, labelled: bool = True) -> None:
        self.num, self.channels, self.labelled = num, channels, labelled

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        shape = (A, K, self.channels, S, S)
        item: dict[str, Any] = {"views": torch.randint(256, shape, dtype=torch.uint8, generator=generator)}
        item["image_ids"] = 10 * index
        if self.labelled:
            item["labels"] = torch.randint(-1, 2, (LABELS,), dtype=torch.int8, generator=generator)
        return item


class Images(Dataset[dict[str, Any]]):
    """Whole images of the same kind, not necessarily square."""

    def __init__(self, num: int = 6, channels: int = 3) -> None:
        self.num, self.channels = num, channels

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1000 + index)
        pixels = torch.randint(256, (self.channels, S, S + 16), dtype=torch.uint8, generator=generator)
        return {"image": pixels, "image_ids": index, "labels": torch.ones(LABELS, dtype=torch.int8)}


class OwnData(L.LightningDataModule):
    """A custom datamodule: the module only requires its batches."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Views(), batch_size=B)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Images(), batch_size=3)

    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Images(), batch_size=4)


class Endless(IterableDataset[dict[str, Any]]):
    """A stream of views of unknown length."""

    num_blocks = K

    def __iter__(self) -> Iterator[dict[str, Any]]:
        source = Views()
        index = 0
        while True:
            yield source[index]
            index += 1


def small(
    backbone: Any = "test_resnet", *, kind: type[MultiLabelSSLModule] = MultiLabelSSLModule, **settings: Any
) -> MultiLabelSSLModule:
    torch.manual_seed(0)
    return kind(backbone, **{"projection_dim": P, "predictor_dim": 4, **settings})


def view_batch(num: int = B, **changes: Any) -> Any:
    batch = next(iter(DataLoader(Views(num), batch_size=num)))
    return {name: value for name, value in {**batch, **changes}.items() if value is not None}


def trainer(folder: Path, **settings: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return L.Trainer(**{**quiet, **settings})


def own_network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def mean_weight(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def learning_rates(folder: Path, module: MultiLabelSSLModule, loader: Any = None, **settings: Any) -> list[list[float]]:
    """Learning rate of each parameter group at each optimizer step."""

    class Note(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            rates.append([group["lr"] for group in optimizer.param_groups])

    rates: list[list[float]] = []
    loader = DataLoader(Views(), batch_size=2) if loader is None else loader
    trainer(folder, callbacks=[Note()], **settings).fit(module, loader)
    return rates
