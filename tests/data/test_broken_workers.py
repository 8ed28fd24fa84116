"""Loader failures during a run: an error with image and rank, without waiting."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.decoding import decode_rgb
from mlssl.data.readers.folder import read_folder
from mlssl.data.records import Records

IMAGES, BATCH, LONGEST = 12, 2, 60


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(IMAGES):
        Image.fromarray(np.full((24, 24, 3), 20 * number, np.uint8)).save(tmp_path / f"{number:02}.png")
    return tmp_path


def batches(records: Records, workers: int = 2, **settings: Any) -> Any:
    return MultiLabelDataModule(
        train=records, batch_size=BATCH, size=16, num_workers=workers, **settings
    ).train_dataloader()


def decode_or_die(path: Path) -> Any:
    if path.stem == "07":
        os.kill(os.getpid(), signal.SIGKILL)
    return decode_rgb(path)


def decode_or_end(path: Path) -> Any:
    if path.stem == "07":
        os._exit(3)
    return decode_rgb(path)


def decode_or_wait(path: Path) -> Any:
    if path.stem == "07":
        time.sleep(10 * LONGEST)
    return decode_rgb(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decode", "settings", "what"),
    [
        (decode_or_die, {}, r"worker \d+ was killed by SIGKILL"),
        (decode_or_end, {}, r"worker \d+ ended with exit code 3"),
        (decode_or_wait, {"timeout": 2}, "DataLoader timed out after 2 seconds"),
        (decode_or_wait, {"timeout": 7}, "DataLoader timed out after 7 seconds"),
    ],
)
def test_a_dead_or_hanging_worker_ends_the_run_with_rank_and_images(
    decode: Any, settings: dict[str, Any], what: str, photos: Path
) -> None:
    names = [path.name for path in sorted(photos.iterdir())]
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"No batch came on rank 0: {what}\. .* waited for .*") as caught:
        list(batches(Records(names, root=photos, decode=decode), **settings))
    assert time.monotonic() < start + LONGEST
    if settings:  # of a worker that died only the step that was waited for is known
        assert str(photos / "07.png") in str(caught.value)


KILLED_IN_A_STEP = """
import multiprocessing, sys, time
import lightning as L
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.readers.folder import read_folder
from mlssl.module import MultiLabelSSLModule

class Kill(L.Callback):
    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_step == 2:
            max(multiprocessing.active_children(), key=lambda child: child.pid).kill()
            time.sleep(2)
            print("the step goes on")

    def on_train_batch_end(self, trainer, *_):
        print(trainer.global_step)

data = MultiLabelDataModule(train=read_folder(sys.argv[1]), batch_size=2, size=32, num_workers=2)
settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = L.Trainer(max_epochs=3, accelerator="cpu", callbacks=Kill(), default_root_dir=sys.argv[1], **settings)
trainer.fit(MultiLabelSSLModule("test_resnet", projection_dim=8, predictor_dim=4), data)
"""


@pytest.mark.slow
def test_a_worker_death_during_a_step_is_reported_after_the_step(photos: Path) -> None:
    """torch would raise it where the main thread is, and the step that is saved would be half made."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED_IN_A_STEP, photos], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 1
    said = done.stdout.split("the step goes on\n")[1].split()
    assert said[0] == "3"  # that step was made
    assert re.match(
        r"RuntimeError: No batch came on rank 0: worker \d+ was killed by SIGKILL\. Step \d of epoch \d waited for "
        rf"{photos}/\d\d\.png, {photos}/\d\d\.png\. Check these images and this machine's memory",
        done.stderr.strip().splitlines()[-1],
    )


def loader_of(kind: str, workers: int, photos: Path) -> Any:
    data = MultiLabelDataModule(train=read_folder(photos), batch_size=BATCH, size=16, num_workers=workers)
    return data.train_dataloader() if kind == "views" else data.image_dataloader("train")


@pytest.mark.parametrize(("kind", "workers"), [("views", 0), ("views", 2), ("whole images", 0)])
def test_a_file_that_is_removed_during_training_is_named_with_rank_and_step(
    kind: str, workers: int, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlssl.data.loader.rank", lambda: 3)
    seen = iter(loader_of(kind, workers, photos))
    next(seen)
    for path in photos.iterdir():
        path.unlink()
    step = r"step \d of epoch 0" if kind == "views" else r"batch \d of whole images"
    with pytest.raises(
        FileNotFoundError, match=rf"'{photos}/\d\d\.png' on rank 3, in {step}: check this file"
    ) as caught:
        list(seen)
    assert "Traceback" not in str(caught.value)


@pytest.mark.slow
def test_a_hanging_disk_in_an_evaluation_is_reported_with_rank_and_images(photos: Path) -> None:
    names = [path.name for path in sorted(photos.iterdir())]
    records = Records(names, root=photos, decode=decode_or_wait)
    data = MultiLabelDataModule(train=records, batch_size=BATCH, size=16, num_workers=1, timeout=2)
    said = r"on rank 0: DataLoader timed out .*Batch 3 of whole images waited for .*/06.png, .*/07.png"
    with pytest.raises(RuntimeError, match=said):
        list(data.image_dataloader("train"))


def test_a_negative_timeout_is_refused(photos: Path) -> None:
    with pytest.raises(ValueError, match="timeout=-1 was given: pass a number of at least 0"):
        batches(read_folder(photos), timeout=-1)
