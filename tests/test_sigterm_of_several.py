"""SIGTERM to one of several processes: all save, end before the same step, and resume as if uninterrupted."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from _gloo import Processes
from _killed import fingerprint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mlssl.callbacks import OnlineLinearProbe, RandomState
from mlssl.checkpoint import AtomicCheckpointIO, RunCheckpoint
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.distributed import rank
from mlssl.module import MultiLabelSSLModule


def trained(folder: Path, signalled: int | None, workers: int) -> str | None:
    """Two epochs on this process's share, from folder/last.ckpt if it exists; returns a hash, or None if ended.

    SIGTERM reaches only one process, and its loader's workers, in the middle of step `signalled`.
    """

    class Signalled(MultiLabelSSLModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if rank() == 1 and self.global_step == signalled:
                for process in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
                    os.kill(process or 0, signal.SIGTERM)
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    module = Signalled("test_vit", projection_dim=16, predictor_dim=8, backbone_kwargs={"drop_path_rate": 0.3})
    data = MultiLabelDataModule(
        train=synthetic_scenes("train", size=32, count=17),
        val=synthetic_scenes("test", size=32, count=6),
        batch_size=2,
        size=32,
        num_workers=workers,
    )
    saver, last = RunCheckpoint(dirpath=folder, filename="{step}", save_last=True), folder / "last.ckpt"
    probe = OnlineLinearProbe()
    os.environ["LOCAL_RANK"] = str(rank())  # tells Lightning that the processes are already running
    try:
        trainer = L.Trainer(
            max_epochs=2,
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            callbacks=[probe, RandomState(), saver],
            plugins=[AtomicCheckpointIO()],
            logger=False,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)
    except SIGTERMException:
        return None
    finally:
        del os.environ["LOCAL_RANK"]
    return fingerprint([module.state_dict(), trainer.optimizers[0].state_dict(), probe.state_dict()])


@pytest.mark.slow
@pytest.mark.parametrize(("step", "workers"), [(1, 0), (3, 0), (1, 1)])
def test_all_processes_save_the_same_step_if_one_gets_sigterm(
    step: int, workers: int, tmp_path: Path, processes: Processes
) -> None:
    """Step 3 is the last of an epoch: its validation comes first."""
    disturbed = tmp_path / "disturbed"
    assert processes.run(trained, disturbed, step, workers) == [None, None]
    saved = torch.load(disturbed / "last.ckpt", weights_only=True)
    assert saved["global_step"] == step + 1
    found, expected = (processes.run(trained, folder, None, workers) for folder in (disturbed, tmp_path / "whole"))
    assert None not in expected
    assert found == expected
