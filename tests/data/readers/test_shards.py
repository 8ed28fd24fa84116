"""Shards: packed records are read back, in any process and order, also over HTTP; errors are reported."""

from __future__ import annotations

import http.server
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from _gloo import Processes
from PIL import Image
from torch import nn

from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.data.datasets import ImageDataset
from mlssl.data.decoding import BadImageError
from mlssl.data.packing import pack_shards
from mlssl.data.readers.coco import read_coco
from mlssl.data.readers.corel5k import read_corel5k
from mlssl.data.readers.shards import has_split, read_shards
from mlssl.data.records import Records
from mlssl.distributed import rank, world_size
from mlssl.module import MultiLabelSSLModule

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on machines with fewer cores

CLASSES = ["sky", "sea", "sun"]
NUMBER = 14


def photographs(root: Path, number: int = NUMBER) -> Records:
    """Files of several formats in folders, with labels of all three kinds and ids in no order."""
    dice = np.random.default_rng(0)
    names = [f"{'abc'[one % 3]}/ä {one}.{('jpg', 'png', 'webp')[one % 3]}" for one in range(number)]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dice.integers(256, size=(24, 30, 3), dtype=np.uint8)).save(root / name)
    labels = dice.integers(-1, 2, size=(number, 3))
    labels[0] = 0
    return Records(names, labels, CLASSES, image_ids=dice.permutation(number) * 7 - 20, root=root)


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return photographs(tmp_path / "photos")


@pytest.fixture
def packed(records: Records, tmp_path: Path) -> Path:
    """Those images in three archives or more, and the first of them as a val set."""
    folder = tmp_path / "packed"
    pack_shards({"train": records, "val": records.subset([0, 1, 2])}, folder)
    return folder


def assert_same(found: Records, expected: Records) -> None:
    assert found.classes == expected.classes
    assert found.image_ids.tolist() == expected.image_ids.tolist()
    assert (found.labels is None) == (expected.labels is None)
    if found.labels is not None:
        assert np.array_equal(found.labels, expected.labels)
    for index in range(len(expected)):
        assert found.path(index).name == expected.path(index).name
        assert np.array_equal(found.image(index), expected.image(index))


def batches(data: MultiLabelDataModule, epoch: int = 0) -> list[Any]:
    loader: Any = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def assert_same_batches(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in other)


# ---------------------------------------------------------------------- reading back


def test_packed_records_are_read_back_also_from_a_copy_and_a_subset(packed: Path, records: Records) -> None:
    found = read_shards(packed)
    assert_same(found, records)
    assert found.path(3) == packed / "train" / "000000.tar" / "a" / "ä 3.jpg"
    assert_same(pickle.loads(pickle.dumps(found)), records)
    assert_same(found.subset([5, 2, 9]), records.subset([5, 2, 9]))
    assert_same(found.with_classes([2, 0]), records.with_classes([2, 0]))
    assert_same(read_shards(packed, "val"), records.subset([0, 1, 2]))
    assert_same(read_shards(packed / "val", ""), records.subset([0, 1, 2]))


def test_relative_and_moved_folders_are_read(packed: Path, records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(packed.parent)
    shutil.move("packed", "moved")
    for root in ("moved", "./moved/", Path("moved"), "photos/../moved"):
        assert_same(read_shards(root), records)
    monkeypatch.chdir("moved")
    assert_same(read_shards("."), records)


def test_unlabelled_images_and_any_channels_are_read_back(tmp_path: Path) -> None:
    bands = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    (tmp_path / "bands").mkdir()
    bands.tofile(tmp_path / "bands" / "a.raw")
    pack_shards({"train": Records(["a.raw"], root=tmp_path / "bands")}, tmp_path / "packed")
    found = read_shards(tmp_path / "packed", decode=as_bands, channels=5)
    assert (found.labels, found.classes) == (None, ())
    assert np.array_equal(found.image(0), bands)
    assert not has_split(tmp_path / "packed", "val")


def as_bands(content: bytes, name: str) -> np.ndarray:
    assert name.endswith("train/000000.tar/a.raw")
    return np.frombuffer(content, np.uint8).reshape(2, 3, 5)


def test_views_of_coco_and_of_its_shards_are_the_same(coco256: Path, tmp_path: Path) -> None:
    coco = {split: read_coco(coco256, f"{split}2017").subset(range(24)) for split in ("train", "val")}
    pack_shards(coco, tmp_path / "packed", 1)
    assert len(list((tmp_path / "packed" / "train").glob("*.tar"))) > 2
    settings: dict[str, Any] = {"batch_size": 8, "size": 32}
    files = MultiLabelDataModule(train=coco["train"], val=coco["val"], num_workers=0, **settings)
    shards = MultiLabelDataModule("shards", tmp_path / "packed", num_workers=2, **settings)
    for epoch in (0, 3):
        assert_same_batches(batches(shards, epoch), batches(files, epoch))
    assert_same_batches(list(shards.val_dataloader()), list(files.val_dataloader()))


def test_corel5k_is_read_back_byte_for_byte(corel5k: Path, tmp_path: Path) -> None:
    expected = read_corel5k(corel5k, "test").subset(range(40))
    pack_shards({"test": expected}, tmp_path / "packed")
    assert_same(read_shards(tmp_path / "packed", "test"), expected)


def weights_of_a_run(data: MultiLabelDataModule, folder: Path) -> dict[str, torch.Tensor]:
    L.seed_everything(0, verbose=False)
    module = MultiLabelSSLModule("test_resnet", projection_dim=8, predictor_dim=4)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, data)
    return module.state_dict()


def test_a_run_on_shards_ends_with_the_weights_of_one_on_files(packed: Path, records: Records, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"batch_size": 4, "size": 32, "num_workers": 0}
    files = weights_of_a_run(MultiLabelDataModule(train=records, **settings), tmp_path)
    shards = weights_of_a_run(MultiLabelDataModule("shards", packed, val_split="", **settings), tmp_path)
    assert all(torch.equal(shards[name], value) for name, value in files.items())


# ---------------------------------------------------------------------- processes


class Seen(L.Callback):
    """Image ids of every step of every epoch."""

    def __init__(self) -> None:
        self.ids: list[list[int]] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self.ids.append([])

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.ids[-1] += batch["image_ids"].tolist()


def ids_of_two_epochs(root: Path) -> list[list[int]]:
    warnings.simplefilter("ignore")
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    seen = Seen()
    os.environ["LOCAL_RANK"] = str(rank())  # Lightning must not start the processes itself
    try:
        trainer = L.Trainer(
            accelerator="cpu", devices=world_size(), strategy="ddp", max_epochs=2, logger=False, callbacks=[seen],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=root,
        )  # fmt: skip
        data = MultiLabelDataModule("shards", root, batch_size=2, size=16, val_split="", num_workers=2)
        trainer.fit(MultiLabelSSLModule(backbone, projection_dim=4, predictor_dim=2), data)
    finally:
        del os.environ["LOCAL_RANK"]
    return seen.ids


@pytest.mark.slow
def test_two_ranks_with_two_workers_each_see_every_image_once_an_epoch(tmp_path: Path, processes: Processes) -> None:
    records = photographs(tmp_path / "photos", 16)
    pack_shards({"train": records}, tmp_path / "packed")
    first, second = processes.run(ids_of_two_epochs, tmp_path / "packed")
    for epoch in (0, 1):
        assert len(first[epoch]) == len(second[epoch]) == 8
        assert sorted(first[epoch] + second[epoch]) == sorted(records.image_ids.tolist())
    assert first[0] != first[1]


def test_a_stopped_epoch_continues_with_the_next_batch(packed: Path) -> None:
    def data(workers: int) -> MultiLabelDataModule:
        return MultiLabelDataModule("shards", packed, batch_size=3, size=16, num_workers=workers)

    whole = batches(data(0), 1)
    stopped: Any = data(2).train_dataloader()
    stopped.sampler.set_epoch(1)
    running = iter(stopped)
    begun = [next(running) for _ in range(2)]
    resumed: Any = data(1).train_dataloader()
    resumed.load_state_dict(stopped.state_dict())
    assert_same_batches([*begun, *resumed], whole)


@pytest.fixture(scope="module")
def fresh() -> Iterator[ProcessPoolExecutor]:
    """A process that inherits nothing from this one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        yield pool


def ids_and_sums(dataset: ImageDataset) -> list[tuple[int, int]]:
    return [(item["image_ids"], int(item["image"].sum())) for item in map(dataset.__getitem__, range(len(dataset)))]


@pytest.mark.slow
def test_a_worker_that_is_not_forked_reads_the_same(packed: Path, records: Records, fresh: ProcessPoolExecutor) -> None:
    found = fresh.submit(ids_and_sums, ImageDataset(read_shards(packed), (24, 30))).result(timeout=120)
    assert found == ids_and_sums(ImageDataset(records, (24, 30)))


def memory_of_a_large_index(folder: Path) -> float:
    """MB that this process grows by, also for a moment."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    records = read_shards(folder, "")
    assert records.path(118_286).name == f"{118_286:012d}.jpg"
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.mark.slow
def test_an_index_as_large_as_coco_takes_little_memory(tmp_path: Path, fresh: ProcessPoolExecutor) -> None:
    number, size = 118_287, 16
    with (tmp_path / "0.tar").open("wb") as file:
        file.truncate(number * size)
    head = index_head(number, [{"name": "0.tar", "size": number * size}]) | {"classes": [str(one) for one in range(80)]}
    lines = (
        {"name": f"{one:012d}.jpg", "archive": 0, "offset": one * size, "size": size, "image_id": one}
        | {"present": [one % 80, (one + 7) % 80, (one + 31) % 80], "unknown": []}
        for one in range(number)
    )
    (tmp_path / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (head, *lines)))
    grown = fresh.submit(memory_of_a_large_index, tmp_path).result(timeout=120)
    print(f"an index of {number} images: {grown:.0f} MB at most")
    assert grown < 150
    assert len(pickle.dumps(read_shards(tmp_path, ""))) < 30e6, "what each worker is sent"


# ---------------------------------------------------------------------- over HTTP


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Python's file server with range requests, like object stores."""

    parts = True

    def do_GET(self) -> None:
        path, asked = Path(self.translate_path(self.path)), self.headers.get("Range")
        if not (self.parts and asked and path.is_file()):
            return super().do_GET()
        start, end = map(int, asked.removeprefix("bytes=").split("-"))
        content = path.read_bytes()
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        self.send_header("Content-Length", str(len(content[start : end + 1])))
        self.end_headers()
        self.wfile.write(content[start : end + 1])
        return None

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def address(packed: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(packed))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_shards_are_read_from_a_server_also_by_workers(address: str, packed: Path, records: Records) -> None:
    assert_same(read_shards(address), records)
    settings: dict[str, Any] = {"batch_size": 4, "size": 16}
    served = MultiLabelDataModule("shards", address, num_workers=2, **settings)
    assert_same_batches(batches(served), batches(MultiLabelDataModule(train=records, num_workers=0, **settings)))
    assert served.val_records is not None


def test_a_failing_server_is_reported(address: str, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_shards(address)
    monkeypatch.setattr(Ranges, "parts", False)
    with pytest.raises(
        OSError, match=r"000000\.tar' returned \d+ bytes instead of \d+ for .*: copy the archive again, or use"
    ):
        found.image(0)
    (packed / "train" / "000000.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"no 'http:.*000000\.tar/a/ä 0\.jpg' \(.*\): put it there, or pass"):
        found.image(0)
    with pytest.raises(FileNotFoundError, match=r"no 'http:.*/train/\*\.tar' \(.*000000\.tar"):
        read_shards(address)
    with pytest.raises(OSError, match=r"cannot read 'http://127\.0\.0\.1:9/x/.*check the connection"):
        read_shards("http://127.0.0.1:9/x")
    with pytest.raises(OSError, match=r"cannot read 'http://127\.0\.0\.1:9/x/val/"):
        has_split("http://127.0.0.1:9/x", "val")


# ---------------------------------------------------------------------- errors


def index_head(images: int, archives: Any) -> dict[str, Any]:
    return {"format": "mlssl shards 1", "images": images, "classes": None, "archives": archives}


HEADS: list[tuple[dict[str, Any], str]] = [
    (
        {"format": "mlssl shards 2"},
        "line 1 of .* does not have the format 'mlssl shards 1': pass the folder that mlssl pack wrote",
    ),
    ({"images": 0}, "does not give the number of images"),
    ({"images": 2.0}, "does not give the number of images"),
    ({"images": 15}, "lists 14 images instead of 15: copy it again"),
    ({"classes": ["sky", 3]}, "does not list class names"),
    ({"classes": []}, "does not list class names"),
    ({"classes": "none"}, "does not list class names"),
    ({"classes": ["sky"]}, "line 3 of .* has labels that are not indices of the 1 classes: pack"),
    ({"classes": None}, "line 2 of .* has labels without classes, or classes without labels"),
    ({"archives": []}, "does not list archives"),
    ({"archives": [{"name": "../0.tar", "size": 1}]}, "has an archive without a plain name or a size"),
    ({"archives": [{"name": "..", "size": 1}]}, "has an archive without a plain name or a size"),
    ({"archives": [{"size": 1}]}, "has an archive without a plain name or a size"),
    ({"archives": [{"name": "0.tar", "size": "1"}]}, "has an archive without a plain name or a size"),
    ({"archives": [{"name": "0.tar", "size": 1}] * 2}, "lists an archive twice"),
    ({"archives": [{"name": "gone.tar", "size": 10**9}]}, r"no '.*/train/\*\.tar' \(.*gone\.tar.*\): put it there"),
    (
        {"archives": [{"name": "000000.tar", "size": 10**9}]},
        r"000000\.tar' has \d+ bytes instead of the 1000000000 in .*: copy",
    ),
]
LINES: list[tuple[dict[str, Any], str]] = [
    ({"size": 1.5}, "line 3 of .* has no integers as archive, offset, size, image_id: pack the images again"),
    ({"image_id": True}, "has no integers"),
    ({"image_id": 2**63}, "has no integers"),
    ({"image_id": None}, "has no integers"),
    ({"image_id": -20 + 7 * 9}, "repeats names or image ids"),
    ({"name": "../a.jpg"}, r"names the image '\.\./a\.jpg': expected a path inside the image folder"),
    ({"name": "/etc/passwd"}, "names the image '/etc/passwd'"),
    ({"name": ""}, "has the name '', which is not a file name"),
    ({"name": "a//b.jpg"}, "has the name 'a//b.jpg'"),
    ({"name": "a\0"}, "has the name"),
    ({"name": "\ud800"}, "has the name"),
    ({"name": 3}, "has the name 3"),
    ({"name": "c/ä 2.webp"}, "repeats names or image ids"),
    ({"archive": 1}, "names archive 1 of 1"),
    ({"archive": -1}, "names archive -1"),
    ({"offset": 10**8}, r"puts the image at 100000000, \d+ bytes long, outside its archive"),
    ({"offset": -1}, "puts the image at -1"),
    ({"size": -1}, "outside its archive"),
    ({"present": "sky"}, "has labels that are not indices of the 3 classes"),
    ({"present": [3]}, "has labels that are not indices"),
    ({"present": [False]}, "has labels that are not indices"),
    ({"unknown": [0, 0]}, "has a label twice"),
    ({"present": [1], "unknown": [1]}, "has a label twice"),
]


@pytest.mark.parametrize(("row", "changes", "sentence"), [*((0, *one) for one in HEADS), *((2, *one) for one in LINES)])
def test_a_wrong_index_is_reported(row: int, changes: dict[str, Any], sentence: str, packed: Path) -> None:
    index = packed / "train" / "index.jsonl"
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    lines[2] |= {"present": [2], "unknown": []}
    lines[row] |= changes
    index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
        read_shards(packed)
    assert str(packed) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda whole: whole[:-30], "line 15 of .*index.jsonl' is not JSON .*: copy it again or pack the images again"),
        (lambda whole: b"", "line 1 of .* is not JSON"),
        (lambda whole: b"[" * 10**5, "line 1 of .* is not JSON"),
        (lambda whole: b"[1]\n" + whole, "line 1 of .* does not have the format"),
        (lambda whole: whole + b"\xff", "line 16 of .* is not JSON"),
        (lambda whole: whole[: whole.rindex(b"{")], "lists 13 images instead of 14"),
    ],
)
def test_a_truncated_index_or_another_file_is_reported(change: Any, sentence: str, packed: Path) -> None:
    index = packed / "train" / "index.jsonl"
    index.write_bytes(change(index.read_bytes()))
    with pytest.raises(ValueError, match=sentence):
        read_shards(packed)


def test_missing_archives_and_wrong_sizes_are_reported_before_training(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no '.*/packed/test/index\.jsonl' .*pass the folder that mlssl pack"):
        read_shards(packed, "test")
    archive = packed / "train" / "000000.tar"
    archive.write_bytes(archive.read_bytes()[:-1])
    data = MultiLabelDataModule("shards", packed, batch_size=2)
    with pytest.raises(ValueError, match=r"000000\.tar' has \d+ bytes instead of the \d+ in .*: copy it again"):
        data.setup()
    archive.unlink()
    with pytest.raises(FileNotFoundError, match=r"no '.*/train/\*\.tar' \(.*000000\.tar"):
        data.setup()
    with pytest.raises(ValueError, match=r"cannot open 'nosuch://bucket/train' \(.*nosuch.*\): pass a folder, or"):
        read_shards("nosuch://bucket")


def test_later_failures_name_the_image(packed: Path, records: Records) -> None:
    found = read_shards(packed)
    archive = packed / "train" / "000000.tar"
    whole = archive.read_bytes()
    archive.write_bytes(whole[:700])
    with pytest.raises(OSError, match=r"000000\.tar' returned \d+ bytes instead of \d+ for '000000\.tar/c/ä 11\.webp'"):
        found.image(11)
    archive.unlink()
    with pytest.raises(FileNotFoundError, match=r"no '.*000000\.tar/c/ä 11\.webp' \(.*No such file"):
        found.image(11)
    archive.mkdir()
    with pytest.raises(OSError, match=r"cannot read '.*000000\.tar/c/ä 11\.webp' \(IsADirectoryError"):
        found.image(11)
    with pytest.raises(FileNotFoundError, match=r"index\.jsonl' does not list '000000\.tar/zzz\.jpg': pass a path of"):
        found.decode(packed / "train" / "000000.tar" / "zzz.jpg")
    archive.rmdir()
    archive.write_bytes(whole)
    assert_same(found, records)


def test_images_that_cannot_be_decoded_are_skipped_and_named_as_in_a_folder(tmp_path: Path) -> None:
    records = photographs(tmp_path / "photos", 6)
    records.path(2).write_bytes(records.path(2).read_bytes()[:100])
    records.path(4).write_bytes(b"")
    pack_shards({"train": records}, tmp_path / "packed")
    with pytest.raises(BadImageError, match=r"cannot decode '.*/packed/train/000000\.tar/c/ä 2\.webp' as an image"):
        read_shards(tmp_path / "packed").image(2)
    settings: dict[str, Any] = {"batch_size": 4, "size": 16, "num_workers": 0, "on_bad_image": "skip"}
    shards = MultiLabelDataModule("shards", tmp_path / "packed", **settings)
    files = MultiLabelDataModule(train=records, **settings)
    assert_same_batches(batches(shards) + batches(shards, 1), batches(files) + batches(files, 1))
    skipped = [[path.name for path in data.skipped_images["train"]] for data in (shards, files)]
    assert skipped[0] == skipped[1] != []
