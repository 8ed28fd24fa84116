"""torch's random state in the checkpoint: restored only for training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from _gloo import Processes

from mlssl.callbacks import RandomState
from mlssl.distributed import rank


def test_evaluating_a_checkpoint_changes_no_random_state(
    make_model: Callable[..., Any], make_data: Callable[..., Any], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    first = make_trainer(RandomState(), max_epochs=1)
    first.fit(make_model(), make_data())
    first.save_checkpoint(tmp_path / "one.ckpt")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    make_trainer(RandomState()).validate(make_model(), make_data(), tmp_path / "one.ckpt", weights_only=True)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before)


def states() -> tuple[torch.Tensor, dict[str, Any]]:
    torch.manual_seed(rank())
    checkpoint: dict[str, Any] = {}
    RandomState().on_save_checkpoint(L.Trainer(logger=False, accelerator="cpu"), L.LightningModule(), checkpoint)
    return torch.get_rng_state(), checkpoint["random_state"]


def restored(saved: dict[str, torch.Tensor]) -> torch.Tensor:
    callback = RandomState()
    callback.on_load_checkpoint(None, None, {"random_state": saved})  # type: ignore[arg-type]
    callback.on_train_start(None, L.LightningModule())  # type: ignore[arg-type]
    return torch.get_rng_state()


def test_every_process_gets_its_own_state_back(processes: Processes) -> None:
    (first, saved), (second, also_saved) = processes.run(states)
    assert not torch.equal(first, second)
    assert torch.equal(saved["cpu"], torch.stack([first, second]))
    assert torch.equal(saved["cpu"], also_saved["cpu"])
    assert all(map(torch.equal, processes.run(restored, saved), (first, second)))


def test_a_process_missing_in_the_checkpoint_keeps_its_state() -> None:
    callback, before = RandomState(), torch.get_rng_state()
    callback.on_load_checkpoint(None, None, {"random_state": {"cpu": torch.zeros(0, len(before), dtype=torch.uint8)}})  # type: ignore[arg-type]
    callback.on_train_start(None, None)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_state_of_a_gpu_is_saved_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for torch's generator on the GPU, and tensors that stay on the CPU."""
    gpu, generator = SimpleNamespace(device=torch.device("cuda", 1)), {"state": torch.arange(16, dtype=torch.uint8)}
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda device: generator[f"of {device}"])
    monkeypatch.setattr("torch.cuda.set_rng_state", lambda state, device: generator.update({f"of {device}": state}))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_: tensor)
    generator["of cuda:1"] = saved = generator.pop("state")
    checkpoint: dict[str, Any] = {}
    RandomState().on_save_checkpoint(None, gpu, checkpoint)  # type: ignore[arg-type]
    generator["of cuda:1"] = torch.zeros(16, dtype=torch.uint8)
    callback = RandomState()
    callback.on_load_checkpoint(None, gpu, checkpoint)  # type: ignore[arg-type]
    assert not generator["of cuda:1"].any()
    callback.on_train_start(None, gpu)  # type: ignore[arg-type]
    assert torch.equal(generator["of cuda:1"], saved)
