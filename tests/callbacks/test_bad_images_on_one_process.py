"""A process that loses a whole batch of validation images: it takes as many steps as the others, and none waits."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from _gloo import Processes
from torch import nn

from mlssl.callbacks import OnlineKNN, OnlineLinearProbe
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.decoding import BadImageError
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.data.records import Records
from mlssl.distributed import rank, world_size
from mlssl.module import MultiLabelSSLModule

SCENES = synthetic_scenes("test", size=32, count=8)


def all_but_two(path: Path) -> Any:
    if int(path.name) in (1, 7):
        raise BadImageError(f"{path} is broken")
    return SCENES.image(int(path.name))


def scores(folder: Path) -> dict[str, float]:
    """A run whose images 1 and 7, in the first and last batch of rank 1 of 2, cannot be decoded."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 5, stride=3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    names = [str(number) for number in range(8)]
    data = MultiLabelDataModule(
        train=synthetic_scenes("train", size=32, count=8),
        val=Records(names, SCENES.labels, SCENES.classes, decode=all_but_two),
        batch_size=2 // world_size(),
        size=16,
        eval_size=32,
        num_workers=0,
        on_bad_image="skip",
    )
    if world_size() > 1:
        os.environ["LOCAL_RANK"] = str(rank())  # tells Lightning that the processes are already running
    try:
        trainer = L.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=world_size(),
            strategy="ddp" if world_size() > 1 else "auto",
            callbacks=[OnlineKNN(k=3, every_n_epochs=1), OnlineLinearProbe()],
            logger=False,
            default_root_dir=folder,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="2 images could not be decoded")
            trainer.fit(MultiLabelSSLModule(net, projection_dim=16, predictor_dim=8, base_lr=1e-30), data)
    finally:
        os.environ.pop("LOCAL_RANK", None)
    return {name: trainer.callback_metrics[name].item() for name in ("knn/mAP", "probe/mAP")}


def test_all_processes_take_the_same_steps_and_score_as_one_does(tmp_path: Path, processes: Processes) -> None:
    one = scores(tmp_path)
    assert 0 < one["knn/mAP"] <= 1
    assert processes.run(scores, tmp_path) == [pytest.approx(one, rel=1e-5)] * 2
