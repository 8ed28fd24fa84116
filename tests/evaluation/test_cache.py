"""Features on disk: equal to those in memory, passes that resume, and caches that are refused."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mlssl.atomic import FullDiskError
from mlssl.data.datasets import ImageDataset
from mlssl.data.records import Records
from mlssl.evaluation import cache as module
from mlssl.evaluation.features import Features, extract_features

COUNT = 23


class Images(Dataset[dict[str, Any]]):
    """Images that depend only on their ids; counts reads, and may fail at one."""

    def __init__(self, count: int = COUNT, labels: int = 3, seed: int = 0, fails_at: int | None = None) -> None:
        self.count, self.labels, self.seed, self.fails_at = count, labels, seed, fails_at
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == self.fails_at:
            raise OSError("the disk went away")
        self.read.append(index)
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        image = torch.randint(0, 256, (3, 8, 8), generator=generator).to(torch.uint8)
        labels = {"labels": torch.arange(self.labels, dtype=torch.int8) % 2} if self.labels else {}
        return {"image": image, "image_ids": 100 + index, **labels}


def loader(images: Images, **settings: Any) -> DataLoader[Any]:
    return DataLoader(images, batch_size=4, **settings)


@pytest.fixture
def model() -> SimpleNamespace:
    return made_model()


def made_model() -> SimpleNamespace:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return SimpleNamespace(backbone=backbone, normalize=lambda images: images.float() / 255)


@pytest.fixture(autouse=True)
def _note_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_UPDATES", -1.0)


def assert_same(left: Features, right: Features) -> None:
    torch.testing.assert_close(left.features, right.features)
    assert torch.equal(left.image_ids, right.image_ids)
    assert (left.labels is None and right.labels is None) or torch.equal(left.labels, right.labels)  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", [3, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_features_on_disk_equal_those_in_memory(
    dtype: torch.dtype, labels: int, model: SimpleNamespace, tmp_path: Path
) -> None:
    images = Images(labels=labels)
    in_memory = extract_features(model, loader(images), dtype=dtype)
    on_disk = extract_features(model, loader(images), dtype=dtype, cache=tmp_path / "cache")
    assert in_memory.features.dtype == on_disk.features.dtype == dtype
    assert_same(on_disk, in_memory)
    assert np.array_equal(np.load(tmp_path / "cache" / "features.npy"), in_memory.features.numpy())
    on_disk.features.add_(1)  # stays in memory
    assert_same(extract_features(model, loader(images), dtype=dtype, cache=tmp_path / "cache"), in_memory)


def test_a_finished_pass_is_not_repeated(model: SimpleNamespace, tmp_path: Path) -> None:
    images = Images()
    first = extract_features(model, loader(images), cache=tmp_path)
    images.read.clear()
    assert_same(extract_features(model, loader(images), cache=tmp_path), first)
    assert images.read == [0, COUNT - 1], "only the two that are compared"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_failed_pass_resumes(workers: int, model: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the disk went away"):
        extract_features(model, loader(Images(fails_at=13), num_workers=workers), cache=tmp_path)
    with (tmp_path / "features.npy").open("ab") as file:
        file.write(b"half a line")  # as a killed process leaves it
    images = Images()
    resumed = extract_features(model, loader(images, num_workers=workers), cache=tmp_path)
    if not workers:
        assert images.read == [0, 11, *range(12, COUNT)]
    assert_same(resumed, extract_features(model, loader(Images())))


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
from test_cache import Images, extract_features, loader, made_model, module
module.SECONDS_BETWEEN_UPDATES = -1.0

class Slow(Images):
    def __getitem__(self, index):
        if index >= 12:
            print("ready", flush=True)
            time.sleep(60)
        return super().__getitem__(index)

extract_features(made_model(), loader(Slow()), cache=sys.argv[1])
"""


@pytest.mark.slow
def test_a_killed_pass_resumes(model: SimpleNamespace, tmp_path: Path) -> None:
    words = [sys.executable, "-c", KILLED, str(tmp_path / "cache"), str(Path(__file__).parent)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
    images = Images()
    resumed = extract_features(model, loader(images), cache=tmp_path / "cache")
    assert images.read == [0, 11, *range(12, COUNT)]
    assert_same(resumed, extract_features(model, loader(Images())))


def test_the_bar_starts_where_the_pass_resumes(
    model: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OSError, match="went away"):
        extract_features(model, loader(Images(fails_at=13)), cache=tmp_path)
    extract_features(model, loader(Images()), cache=tmp_path, progress=True)
    printed = capsys.readouterr().err
    assert printed.strip().startswith(f"features: {12 / COUNT:.0%}")
    assert "100%" in printed


def test_other_features_are_not_used(model: SimpleNamespace, tmp_path: Path) -> None:
    extract_features(model, loader(Images()), cache=tmp_path)
    with pytest.raises(ValueError, match="extracted with num_images 23, but now it is 24: pass another folder"):
        extract_features(model, loader(Images(24)), cache=tmp_path)
    with pytest.raises(ValueError, match="extracted with dtype 'float32', but now it is 'float16'"):
        extract_features(model, loader(Images()), cache=tmp_path, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"features in .* are not those of these images, image 0 differs"):
        extract_features(model, loader(Images(seed=1)), cache=tmp_path)
    model.backbone[0].weight.data.mul_(1.001)
    with pytest.raises(ValueError, match="extracted with weights"):
        extract_features(model, loader(Images()), cache=tmp_path)


def test_features_with_labels_in_another_order_are_not_used(model: SimpleNamespace, tmp_path: Path) -> None:
    for name, gray in (("0.png", 10), ("1.png", 200)):
        Image.new("L", (8, 8), gray).save(tmp_path / name)
    records = Records(["0.png", "1.png"], [[1, 0], [0, 1]], ["sky", "sea"], root=tmp_path)

    def taken(of: Records) -> Features:
        return extract_features(model, DataLoader(ImageDataset(of, (8, 8)), batch_size=2), cache=tmp_path / "cache")

    first = taken(records)
    assert_same(taken(records), first)
    with pytest.raises(ValueError, match=r"were extracted with labels '\w+', but now it is '\w+': pass another folder"):
        taken(records.with_classes([1, 0]))


def test_labels_that_appear_or_disappear_are_detected(model: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="went away"):
        extract_features(model, loader(Images(fails_at=13)), cache=tmp_path)
    with pytest.raises(ValueError, match="the labels have changed"):
        extract_features(model, loader(Images(labels=0)), cache=tmp_path)


def test_damaged_caches_and_other_files_are_named(model: SimpleNamespace, tmp_path: Path) -> None:
    extract_features(model, loader(Images()), cache=tmp_path)
    whole = (tmp_path / "features.npy").read_bytes()
    (tmp_path / "features.npy").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"features\.npy contains \d+ of the \d+ bytes written: it is truncated"):
        extract_features(model, loader(Images()), cache=tmp_path)
    (tmp_path / "features.npy").unlink()
    with pytest.raises(ValueError, match=r"are damaged .*remove that folder"):
        extract_features(model, loader(Images()), cache=tmp_path)
    (tmp_path / "progress.json").write_text(json.dumps({"done": 3}))
    with pytest.raises(ValueError, match="are damaged"):
        extract_features(model, loader(Images()), cache=tmp_path)
    (tmp_path / "progress.json").unlink()
    with pytest.raises(ValueError, match="contains files that are not a feature cache: pass another folder"):
        extract_features(model, loader(Images()), cache=tmp_path)


def test_a_loader_without_a_fixed_order_is_refused(model: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fixed order, which this DataLoader may not have"):
        extract_features(model, loader(Images(), shuffle=True), cache=tmp_path)
    with pytest.raises(ValueError, match="fixed order, which this list may not have"):
        extract_features(model, [], cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_features_beyond_half_precision_and_other_dtypes_are_refused(model: SimpleNamespace) -> None:
    with pytest.raises(TypeError, match=r"dtype=torch\.int8 was given"):
        extract_features(model, loader(Images()), dtype=torch.int8)
    model.backbone[1].bias = nn.Parameter(torch.full((5,), 1e6))
    with pytest.raises(ValueError, match=r"features of image 100 reach 1e\+06, too large for float16: use float32"):
        extract_features(model, loader(Images()), dtype=torch.float16)


def test_a_repeated_image_is_kept_once(model: SimpleNamespace, tmp_path: Path) -> None:
    class Twice(Images):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return super().__getitem__(index % 20)

    ids: Tensor = extract_features(model, loader(Twice()), cache=tmp_path).image_ids
    assert ids.tolist() == [100 + index for index in range(20)]


TWO = """
import sys, time
sys.path.insert(0, sys.argv[2])
from test_cache import Images, extract_features, loader, made_model, module
module.SECONDS_BETWEEN_UPDATES = -1.0

class Slow(Images):
    def __getitem__(self, index):
        print("begins", flush=True)
        time.sleep(0.05)
        return super().__getitem__(index)

images = Slow()
extract_features(made_model(), loader(images), cache=sys.argv[1])
print(len(images.read), flush=True)
"""


@pytest.mark.slow
def test_a_second_process_waits_for_the_first_and_uses_its_features(model: SimpleNamespace, tmp_path: Path) -> None:
    words = [sys.executable, "-c", TWO, str(tmp_path / "cache"), str(Path(__file__).parent)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "begins\n"
        images = Images()
        with pytest.warns(match=f"cache is in use by process {first.pid} on .*: waiting until it has ended"):
            features = extract_features(model, loader(images), cache=tmp_path / "cache")
        assert first.communicate(timeout=60)[0].endswith(f"\n{COUNT}\n")
    assert images.read == [0, COUNT - 1], "only the two that are compared"
    assert_same(features, extract_features(model, loader(Images())))
    assert not list((tmp_path / "cache").glob(".*"))


@pytest.mark.parametrize("limit", [0, 40, 120, 200, 300, 1000])
def test_a_pass_that_filled_the_disk_resumes_when_there_is_space(
    limit: int, model: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write: a header, rows, or the progress."""
    opened = Path.open

    class Limited:
        """A file on a disk of the given size."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: Any) -> int:
            nonlocal limit
            written: int = self.file.write(data[: max(0, limit)])
            limit -= len(data)
            if limit < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return written

    def open_limited(self: Path, mode: str = "r", *words: Any, **settings: Any) -> Any:
        file = opened(self, mode, *words, **settings)
        return Limited(file) if mode in ("w", "wb", "ab") else file

    images = Images()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_limited)
        with pytest.raises(
            FullDiskError, match=r"No space left on device: '[^']*cache[^']*'.*resumes from there; free"
        ):
            extract_features(model, loader(images), cache=tmp_path / "cache")
    done = (
        json.loads(progress.read_text())["done"] if (progress := tmp_path / "cache" / "progress.json").exists() else 0
    )
    assert not list((tmp_path / "cache").glob(".*"))
    images.read.clear()
    features = extract_features(model, loader(images), cache=tmp_path / "cache")
    assert images.read == [*([0, done - 1] if done else []), *range(done, COUNT)]
    assert_same(features, extract_features(model, loader(Images())))


def test_a_complete_cache_is_read_without_write_permission(
    model: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = extract_features(model, loader(Images()), cache=tmp_path)

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("open", "truncate", "replace", "unlink"):
        monkeypatch.setattr(os, name, read_only)
    assert_same(extract_features(model, loader(Images()), cache=tmp_path), first)


def test_a_cache_that_cannot_be_created_is_reported(
    model: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/cache"):
        extract_features(model, loader(Images()), cache=tmp_path / "file" / "cache")
