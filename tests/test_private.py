"""Private internals of torch, Lightning and timm still behave as the library requires."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from mlssl.private import (
    BatchNorm,
    add_to_stepped_batches,
    leave_out_of_torchs_sigchld_handler,
    muon_in_full_precision,
    processor_has_bfloat16,
    resume_max_steps_as_max_epochs,
    stepped_batches,
    trainer_of,
    uncompiled,
    workers_of,
)


def kill_a_worker(batches: Any) -> None:
    """Returns after its death, unless a signal handler raises before."""
    worker = workers_of(batches)[0]
    worker.kill()
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # do not reap: torch asks for it
    time.sleep(0.5)  # another thread may take the signal, and the main one sees it a moment later


def test_workers_of_a_loader_are_its_processes() -> None:
    batches = iter(DataLoader(range(8), num_workers=2))
    assert [worker.is_alive() for worker in workers_of(batches)] == [True, True]
    assert sorted(int(batch) for batch in batches) == list(range(8))
    assert workers_of(iter(DataLoader(range(8)))) == []


@pytest.fixture
def torch_hears_of_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch sets its handler once per process, and Lightning restores the previous one after a fit."""
    before = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.usefixtures("torch_hears_of_workers")
def test_torch_raises_the_death_of_a_worker_in_the_main_thread_unless_deregistered() -> None:
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid \d+\) is killed by signal: Killed"):
        kill_a_worker(iter(DataLoader(range(8), num_workers=1)))
    batches = iter(DataLoader(range(8), num_workers=1))
    leave_out_of_torchs_sigchld_handler(batches)
    kill_a_worker(batches)
    leave_out_of_torchs_sigchld_handler(iter(DataLoader(range(8))))  # has no workers


def test_every_batch_norm_is_recognised() -> None:
    layers = (nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2), nn.LazyBatchNorm2d())
    assert all(isinstance(layer, BatchNorm) for layer in layers)
    assert not isinstance(nn.GroupNorm(1, 2), BatchNorm)


def test_a_compiled_network_contains_the_original_network() -> None:
    network = nn.Linear(1, 1)
    compiled: Any = torch.compile(network)
    assert compiled is not network
    assert uncompiled(compiled) is network
    assert uncompiled(network) is network


def test_torch_reports_whether_the_cpu_has_bfloat16() -> None:
    assert callable(torch.cpu._is_avx512_bf16_supported)
    assert callable(torch.cpu._is_amx_tile_supported)
    with open("/proc/cpuinfo") as file:  # noqa: PTH123
        flags = next((line for line in file if line.startswith("flags")), "").split()
    assert processor_has_bfloat16() == ("avx512_bf16" in flags or "amx_tile" in flags)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_muon_orthogonalises_in_the_precision_of_the_weights(dtype: torch.dtype, tolerance: float) -> None:
    """timm calls one function by its name in one module, in bfloat16 by default."""
    from timm.optim import Muon, muon

    given, updates = muon.zeropower_via_newtonschulz, []
    start, slope = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for whole in (False, True):
        weight = nn.Parameter(start.clone())
        weight.grad = slope.clone()
        optimizer = Muon([weight], lr=1.0)
        if whole:
            with muon_in_full_precision():
                optimizer.step()
        else:
            optimizer.step()
        updates.append(start - weight.detach())
    assert muon.zeropower_via_newtonschulz is given
    exact = given(0.05 * slope, 5, muon.resolve_ns_coefficients("quintic", muon._COEFFICIENTS), dtype=torch.float64)
    exact = exact * 0.2 * 8**0.5
    errors = [float((update - exact).norm() / exact.norm()) for update in updates]
    assert errors[0] > 1e-3
    assert errors[1] < tolerance


class OneWeight(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_the_trainer_counts_completed_batches(tmp_path: Path) -> None:
    module = OneWeight()
    assert trainer_of(module) is None
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(torch.ones(8, 1)))
    assert trainer_of(module) is trainer
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    add_to_stepped_batches(trainer.fit_loop.epoch_loop, -1)
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    counts = [stepped_batches(torch.load(tmp_path / f"{name}.ckpt", weights_only=True)) for name in "ab"]
    assert counts == [3, 2]


def test_the_trainer_decides_in_one_place_whether_it_counts_steps_or_epochs(tmp_path: Path) -> None:
    trainer = L.Trainer(accelerator="cpu", max_steps=3, logger=False, default_root_dir=tmp_path)
    assert trainer.fit_loop._iteration_based_training()
    resume_max_steps_as_max_epochs(trainer.fit_loop)
    trainer.fit_loop.restarting = True
    assert not trainer.fit_loop.restarting  # nothing was begun
