"""Features of both sets of an evaluation: those of `extract_features`, cached in separate folders."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import DataLoader

from mlssl import MultiLabelDataModule, extract_features
from mlssl.evaluation.frozen import frozen_sets
from mlssl.weights.sources import open_backbone


def test_both_sets_equal_those_of_extract_features(tmp_path: Path) -> None:
    model = open_backbone("test_resnet")
    data = MultiLabelDataModule("synthetic", eval_size=32, num_workers=0)
    data.setup()
    loaders = [DataLoader(_First(data.image_dataloader(split).dataset), 4) for split in ("train", "val")]
    sets = frozen_sets(model, *loaders, pooling="max", cache=tmp_path / "kept", name="runs/a b.ckpt", progress=False)
    for found, loader in zip(sets, loaders, strict=True):
        expected = extract_features(model, loader, pooling="max")
        assert torch.equal(torch.as_tensor(found.features), expected.features)
        assert torch.equal(torch.as_tensor(found.image_ids), expected.image_ids)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["runs_a_b.ckpt-test", "runs_a_b.ckpt-train"]


class _First(torch.utils.data.Dataset):
    """The first eight images."""

    def __init__(self, images) -> None:
        self.images = images

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int):
        return self.images[index]
