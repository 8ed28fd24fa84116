"""Memory of a run and of its loader workers over thousands of steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from torch import nn

from mlssl.callbacks import CollapseMonitor, FiniteSteps, OnlineLinearProbe, RandomState, Throughput
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.module import MultiLabelSSLModule

EPOCHS, STEPS = 5, 400
LARGEST_SLOPE = 2.0
"""KB a step that this process and its workers may grow by: 1 GB in 500,000 steps."""


class Watch(L.Callback):
    """Resident memory of this process and of its children, in KB, every tenth step."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.sizes: list[int] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step % 10 == 0:
            self.steps.append(trainer.global_step)
            self.sizes.append(sum(resident(process) for process in [os.getpid(), *children()]))


def resident(process: int) -> int:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def children() -> list[int]:
    return [int(one) for one in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory from /proc")
def test_memory_does_not_grow(tmp_path: Path) -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    module = MultiLabelSSLModule(backbone, projection_dim=8, predictor_dim=4)
    data = MultiLabelDataModule(
        train=synthetic_scenes("train", size=32, count=2 * STEPS), batch_size=2, size=16, num_workers=2
    )
    watch = Watch()
    callbacks = [OnlineLinearProbe(), CollapseMonitor(min_std=0), Throughput(), RandomState(), FiniteSteps(), watch]
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, data)
    steps, sizes = np.array(watch.steps), np.array(watch.sizes)
    settled = steps > STEPS  # the first epoch fills caches
    slope = np.polyfit(steps[settled], sizes[settled], 1)[0]
    print(f"{steps[-1]} steps: {sizes[0] // 1024} MB at first, {sizes[-1] // 1024} at last, {slope:.2f} KB a step")
    assert slope < LARGEST_SLOPE
