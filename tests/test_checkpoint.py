"""Checkpoints under a Trainer: atomic, and opened without running code."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from mlssl.checkpoint import AtomicCheckpointIO, RunCheckpoint

# Lightning's word on resuming in the folder of a run.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


def trainer(folder: Path, max_epochs: int = 1, **kwargs: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=max_epochs,
        limit_train_batches=2,
        limit_val_batches=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[ModelCheckpoint(dirpath=folder / "checkpoints", filename="{epoch}", save_last=True)],
        **kwargs,
    )


def file_names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def fill_the_disk(file: Path, data: Any) -> int:
    with file.open("wb") as opened:
        opened.write(bytes(data)[: len(data) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_run_stops_and_resumes_from_its_checkpoints(tmp_path: Path) -> None:
    trainer(tmp_path).fit(BoringModel())
    assert file_names(tmp_path / "checkpoints") == ["epoch=0.ckpt", "last.ckpt"]
    resumed = trainer(tmp_path, max_epochs=3)
    resumed.fit(BoringModel(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert resumed.global_step == 6
    assert file_names(tmp_path / "checkpoints") == ["epoch=2.ckpt", "last.ckpt"]


def test_a_full_disk_leaves_the_previous_checkpoint_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    trainer(tmp_path).fit(BoringModel())
    before = {name: (folder / name).read_bytes() for name in file_names(folder)}
    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(OSError, match=f"No space left on device: '{folder}"):
        trainer(tmp_path, max_epochs=2).fit(BoringModel(), ckpt_path=folder / "last.ckpt")
    assert {name: (folder / name).read_bytes() for name in file_names(folder)} == before


def test_a_checkpoint_that_cannot_be_pickled_leaves_the_previous_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        AtomicCheckpointIO().save_checkpoint({"step": lambda: 2}, path)
    assert AtomicCheckpointIO().load_checkpoint(path) == {"step": 1}
    assert file_names(tmp_path) == ["last.ckpt"]


@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    endless = (
        "import itertools, torch; from mlssl.checkpoint import AtomicCheckpointIO\n"
        "for step in itertools.count():\n"
        "    weights = torch.full((1_000_000,), float(step))\n"
        f"    AtomicCheckpointIO().save_checkpoint({{'step': step, 'weights': weights}}, {str(path)!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", endless])
    started = time.monotonic()
    while not path.exists() and time.monotonic() < started + 120:
        time.sleep(0.01)
    time.sleep(0.05)
    process.kill()
    process.wait()
    checkpoint = AtomicCheckpointIO().load_checkpoint(path)
    assert torch.equal(checkpoint["weights"], torch.full((1_000_000,), float(checkpoint["step"])))


def test_pickled_code_is_refused_unless_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"folder": Path("somewhere"), "code": os.getcwd}, path)
    with pytest.raises(ValueError, match=r"refused \(it names .*\): train with .* plain values\.$"):
        AtomicCheckpointIO().load_checkpoint(path)
    with pytest.raises(ValueError, match=r"refused \(it names .*\): train with .* plain values\.$"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
    assert AtomicCheckpointIO().load_checkpoint(path, weights_only=False)["code"] is os.getcwd


def test_a_missing_checkpoint_is_reported(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Checkpoint file not found: .*last\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")


def test_other_file_systems_are_left_to_lightning(tmp_path: Path) -> None:
    url = f"memory://{tmp_path}/last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, url)
    assert AtomicCheckpointIO().load_checkpoint(url) == {"step": 1}
    assert file_names(tmp_path) == []


def test_storage_options_are_refused_as_by_lightning(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt", storage_options={})


# ---------------------------------------------------------------------- the end of a run that was not planned


class Fails(BoringModel):
    """Raises in the fourth step, or when a checkpoint is restored."""

    def __init__(self, error: BaseException | None = None, restoring: bool = False) -> None:
        super().__init__()
        self.error, self.restoring = error, restoring

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.error is not None and self.global_step == 3:
            raise self.error
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        class Unrestorable(torch.optim.SGD):
            def load_state_dict(self, state_dict: Any) -> None:
                raise ValueError("no such optimizer")

        return (Unrestorable if self.restoring else torch.optim.SGD)(self.layer.parameters(), lr=0.1)


def ending(folder: Path) -> L.Trainer:
    saver = RunCheckpoint(dirpath=folder, filename="{step}", save_last=True)
    silent: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(
        accelerator="cpu", max_epochs=2, limit_train_batches=5, limit_val_batches=0, callbacks=[saver],
        plugins=[AtomicCheckpointIO()], default_root_dir=folder, **silent,
    )  # fmt: skip


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), SystemExit(1)])
def test_a_failing_run_saves_its_completed_steps(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        ending(tmp_path).fit(Fails(error))
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 3
    with pytest.warns(match="your dataloader is not resumable"):  # Lightning's word on a plain loader
        ending(tmp_path).fit(Fails(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)


def test_nothing_is_saved_after_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError):
        ending(tmp_path).fit(Fails(FloatingPointError("nan")))
    assert file_names(tmp_path) == []


def test_a_failing_save_does_not_hide_why_the_run_ended(tmp_path: Path) -> None:
    class Refuses(Fails):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            raise FloatingPointError("The loss is nan")

    with pytest.warns(match="could not be saved .The loss is nan"), pytest.raises(RuntimeError, match="out of memory"):
        ending(tmp_path).fit(Refuses(RuntimeError("out of memory")))
    assert file_names(tmp_path) == []


def test_nothing_is_saved_by_one_of_several_processes(tmp_path: Path) -> None:
    failing = ending(tmp_path)
    failing.strategy.world_size = 2  # type: ignore[attr-defined]
    saver = failing.checkpoint_callback
    assert isinstance(saver, RunCheckpoint)
    handler = signal.getsignal(signal.SIGTERM)
    saver.on_train_start(failing, BoringModel())
    signal.signal(signal.SIGTERM, handler)  # the Trainer restores it
    saver.on_exception(failing, BoringModel(), RuntimeError())
    assert file_names(tmp_path) == []


def test_a_run_that_cannot_be_restored_leaves_its_checkpoint_alone(tmp_path: Path) -> None:
    ending(tmp_path).fit(Fails())
    before = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(ValueError, match="no such optimizer"):
        ending(tmp_path).fit(Fails(restoring=True), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_a_full_disk_at_the_end_is_reported_with_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.warns(match="could not be saved .*No space left"), pytest.raises(RuntimeError, match="out of memory"):
        ending(tmp_path).fit(Fails(RuntimeError("out of memory")))
    assert file_names(tmp_path) == []


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_a_moved_folder_continues_in_last_ckpt_and_a_new_run_does_not_change_it(tmp_path: Path) -> None:
    ending(tmp_path / "here").fit(BoringModel())
    (tmp_path / "here").rename(tmp_path / "there")
    last = tmp_path / "there" / "last.ckpt"
    for epochs in (3, 4):
        longer = ending(tmp_path / "there")
        longer.fit_loop.max_epochs = epochs
        longer.fit(BoringModel(), ckpt_path=last, weights_only=True)
        assert file_names(tmp_path / "there") == ["last.ckpt", f"step={5 * epochs}.ckpt"]
        assert AtomicCheckpointIO().load_checkpoint(last)["global_step"] == 5 * epochs
    before = last.read_bytes()
    ending(tmp_path / "there").fit(BoringModel())
    assert last.read_bytes() == before
    other = tmp_path / "there" / "last-v1.ckpt"
    assert AtomicCheckpointIO().load_checkpoint(other)["global_step"] == 10
    longer = ending(tmp_path / "there")
    longer.fit_loop.max_epochs = 3
    longer.fit(BoringModel(), ckpt_path=other, weights_only=True)
    assert last.read_bytes() == before
    assert AtomicCheckpointIO().load_checkpoint(other)["global_step"] == 15
