"""The memory of a step, measured before a run, and the batch size that fits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from _toy import small
from _toy import trainer as quiet_trainer

import mlssl.callbacks.step_memory as step_memory
from mlssl.callbacks.networks import workers_of
from mlssl.callbacks.step_memory import StepMemory
from mlssl.cli import main
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.free_memory import free_memory_of_processor
from mlssl.module import MultiLabelSSLModule

GB = 2**30


def data(batch_size: int = 8, **settings: Any) -> MultiLabelDataModule:
    return MultiLabelDataModule(batch_size=batch_size, size=32, num_workers=0, **settings)


class At(L.Callback):
    """Calls a function at the time `StepMemory` measures."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.function(trainer, pl_module)


def fit(folder: Path, *callbacks: L.Callback, module: Any = None, **settings: Any) -> None:
    trainer = quiet_trainer(folder, callbacks=list(callbacks), limit_train_batches=1, limit_val_batches=0)
    trainer.fit(small() if module is None else module, data(**settings))


def test_two_small_steps_predict_the_memory_of_a_large_one(tmp_path: Path) -> None:
    found = {}

    def compare(trainer: Any, module: Any) -> None:
        needed = step_memory._measure(trainer, module)
        batch = step_memory._batch(trainer.datamodule, 16)
        weights = sum(one.nbytes for one in module.parameters())
        with step_memory._restored_afterwards(module):
            for parameter in module.parameters():
                parameter.grad = torch.zeros_like(parameter)
            taken = step_memory._step_bytes(trainer, module, batch)
        found["whole"] = step_memory._SCRATCH * max(taken) + 2 * weights  # gradients and momenta
        found["estimated"] = (
            needed.of(16) - step_memory._waiting_bytes(trainer.datamodule, workers_of(trainer), False) * 16
        )
        found["fits"] = needed.images_in(needed.of(16)), needed.images_in(needed.of(16) - 1)

    fit(tmp_path, At(compare), batch_size=16)
    assert found["estimated"] == pytest.approx(found["whole"], rel=0.05)
    assert found["fits"] == (16, 15)


def test_nothing_of_the_run_changes(tmp_path: Path) -> None:
    def states(module: Any) -> list[Any]:
        tensors = [*module.parameters(), *module.buffers(), torch.get_rng_state()]
        return [[one.clone() for one in tensors], random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002

    def compare(trainer: Any, module: Any) -> None:
        before = states(module)
        assert step_memory._measure(trainer, module).of(8) > 1e6
        after = states(module)
        assert all(torch.equal(one, other) for one, other in zip(before[0], after[0], strict=True))
        assert before[1:] == after[1:]
        assert all(one.grad is None for one in module.parameters())
        assert not trainer.callback_metrics
        assert "log" not in vars(module)

    module = small(backbone_kwargs={"drop_path_rate": 0.5}, views_at_a_time=4)
    fit(tmp_path, At(compare), module=module)
    assert module.views_at_a_time == 4


def test_a_step_that_does_not_fit_is_refused_with_what_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[Any] = []
    measured = step_memory._measure
    monkeypatch.setattr(step_memory, "_measure", lambda *given: needed.append(measured(*given)) or needed[-1])
    monkeypatch.setattr(step_memory, "_free_memory", lambda *_, **__: free)
    free = 1e12
    fit(tmp_path, StepMemory())
    free = needed[0].of(5) + 1
    with pytest.raises(ValueError, match=r"A step of 8 images needs about \d+ MB of memory, but \d+ MB are free"):
        fit(tmp_path, StepMemory())
    with pytest.raises(ValueError, match=r"pass --data\.batch_size 5, or a smaller --data\.size or --model"):
        fit(tmp_path, StepMemory())
    with pytest.warns(UserWarning, match=r"are free: pass --data\.batch_size 5"):
        fit(tmp_path, StepMemory(refuse=False))
    free = needed[0].of(2) - 1
    with pytest.raises(ValueError, match=r"not even 2 images fit; pass a smaller --data\.size"):
        fit(tmp_path, StepMemory())
    free = 1.0
    with pytest.raises(ValueError, match=r"pass a smaller --model\.views_at_a_time than 4"):
        fit(tmp_path, StepMemory(), module=small(views_at_a_time=4))


def test_runs_that_cannot_be_measured_are_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(MultiLabelDataModule):
        pass

    monkeypatch.setattr(step_memory, "_free_memory", lambda *_, **__: 1.0)
    trainer = quiet_trainer(tmp_path, callbacks=[StepMemory()], limit_train_batches=1, limit_val_batches=0)
    trainer.fit(small(), Other(batch_size=8, size=32, num_workers=0))
    assert trainer.global_step == 1

    class Picky(MultiLabelSSLModule):
        def embed(self, views: torch.Tensor) -> Any:
            if len(views) < 8:
                raise KeyError("too few")
            return super().embed(views)

    fit(tmp_path, StepMemory(), module=small(kind=Picky))


@pytest.mark.slow
def test_after_out_of_memory_a_halved_batch_that_fits_is_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    embed = MultiLabelSSLModule.embed

    def limited(module: Any, views: torch.Tensor) -> Any:
        if len(views) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return embed(module, views)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MultiLabelSSLModule, "embed", limited)
    words = ["fit", "--model.backbone=test_resnet", "--model.projection_dim=16", "--trainer.accelerator=cpu"]
    words += ["--data.batch_size=16", "--data.size=32", "--data.num_workers=0", "--trainer.enable_progress_bar=false"]
    words += ["--trainer.num_sanity_val_steps=0", "--trainer.max_epochs=1"]
    for number, said in ((20, "pass --data.batch_size 4, or"), (6, "not even 2 images fit")):
        most = number
        assert main(words) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith(f"mlssl: error: Out of memory in a step of 16 images: {said}")
    most = 1
    assert main(words) == 2
    assert "needs about inf GB of memory" not in (line := capsys.readouterr().err.strip().splitlines()[-1])
    assert "not even 2 images fit" in line


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {8 * 2**20} kB\n", "proc/self/cgroup": "0::/job/step\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 8 * GB),
        ({"sys/fs/cgroup/job/step/memory.max": "max", "sys/fs/cgroup/job/step/memory.current": "5"}, 8 * GB),
        (
            {
                "sys/fs/cgroup/job/memory.max": f"{4 * GB}\n",
                "sys/fs/cgroup/job/memory.current": f"{3 * GB}\n",
                "sys/fs/cgroup/job/memory.stat": f"anon 5\ninactive_file {GB}\n",
            },
            2 * GB,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/a\n4:memory:/outside\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GB}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{2 * GB}\n",
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
            },
            0,
        ),
        ({"proc/meminfo": "MemTotal: 1 kB\n"}, None),
    ],
    ids=["no limit", "max", "of the parent", "version 1", "unknown"],
)
def test_free_memory_respects_the_limits_of_a_job(files: dict[str, str], free: int | None, tmp_path: Path) -> None:
    assert free_memory_of_processor(written(tmp_path, {**MEMINFO, **files})) == free


def test_other_systems_report_no_free_memory(tmp_path: Path) -> None:
    assert free_memory_of_processor(tmp_path) is None
