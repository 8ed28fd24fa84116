"""What may happen to a loader in the middle of a run: an error that names the image and the rank, and no waiting."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.files import read_folder
from mlssl.data.images import decode_rgb
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


def decode_or_wait(path: Path) -> Any:
    if path.stem == "07":
        time.sleep(10 * LONGEST)
    return decode_rgb(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decode", "settings", "what"),
    [(decode_or_die, {}, r"worker \(pid.*(exited|killed)"), (decode_or_wait, {"timeout": 2}, "timed out after 2")],
)
def test_a_worker_that_dies_or_waits_ends_the_run_with_rank_and_images(
    decode: Any, settings: dict[str, Any], what: str, photos: Path
) -> None:
    names = [path.name for path in sorted(photos.iterdir())]
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"No batch came on rank 0: DataLoader {what}.* waited for .*") as caught:
        list(batches(Records(names, root=photos, decode=decode), **settings))
    assert time.monotonic() < start + LONGEST
    if settings:  # of a worker that died only the step that was waited for is known
        assert str(photos / "07.png") in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_is_removed_during_training_is_named(workers: int, photos: Path) -> None:
    loader = batches(read_folder(photos), workers)
    seen = iter(loader)
    next(seen)
    for path in photos.iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{photos}/\d\d\.png"):
        list(seen)


def test_a_timeout_below_nothing_is_refused(photos: Path) -> None:
    with pytest.raises(ValueError, match="timeout=-1 was given: pass a number of at least 0"):
        batches(read_folder(photos), timeout=-1)
