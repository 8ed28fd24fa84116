"""A run small enough for a test of a second: real images, views, model and Trainer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.module import MultiLabelSSLModule


@pytest.fixture
def make_model() -> Callable[..., MultiLabelSSLModule]:
    """A function from settings to a model with a backbone of one convolution, D = 12, that samples random numbers."""

    def make(dropout: float = 0.1, **settings: Any) -> MultiLabelSSLModule:
        torch.manual_seed(0)
        convolution = [nn.Conv2d(3, 12, 5, stride=3), nn.BatchNorm2d(12), nn.ReLU()]
        backbone = nn.Sequential(*convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout))
        return MultiLabelSSLModule(**{"backbone": backbone, "projection_dim": 16, "predictor_dim": 8, **settings})

    return make


@pytest.fixture
def make_data() -> Callable[..., MultiLabelDataModule]:
    """A function from settings to a datamodule of 18 training and 11 validation scenes, 4 steps of 4 images."""

    def make(**settings: Any) -> MultiLabelDataModule:
        sets = {
            "train": synthetic_scenes("train", size=32, count=18),
            "val": synthetic_scenes("test", size=32, count=11),
        }
        return MultiLabelDataModule(**{"batch_size": 4, "size": 16, "num_workers": 0, **sets, **settings})

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    """A function from callbacks and settings to a Trainer of two epochs that logs every second step.

    The first one writes metrics.csv to tmp_path/run0, the second to tmp_path/run1, and so on.
    """
    numbers = itertools.count()

    def make(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
        folder = tmp_path / f"run{next(numbers)}"
        defaults = {
            "max_epochs": 2,
            "log_every_n_steps": 2,
            "logger": CSVLogger(folder, name="", version=""),
            "default_root_dir": folder,
            "accelerator": "cpu",
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        return L.Trainer(callbacks=list(callbacks), **{**defaults, **settings})

    return make
