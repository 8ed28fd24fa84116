"""The loader: images a second by workers, what a batch weighs on its way, what an index of COCO's size weighs.

python examples/benchmarks/loader.py FOLDER

FOLDER contains photographs. Ours and the author's way load by turns; printed are medians and ranges over the rounds.
"""

import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from authors_way import PilViews
from jsonargparse import auto_cli
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mlssl.data.datasets import ViewDataset
from mlssl.data.readers.folder import read_folder
from mlssl.data.records import Records
from mlssl.views.blocks import BlockViews

COCO_IMAGES, COCO_LABELS = 118_287, 80


class Finished(Dataset[Tensor]):
    """Batches that cost nothing to make: what remains is the way from a worker to the device."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, count: int) -> None:
        self.shape, self.dtype, self.count = shape, dtype, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if index >= self.count:
            raise IndexError(index)
        return torch.empty(self.shape, dtype=self.dtype)


def main(
    folder: Path,
    images: int = 128,
    batch_size: int = 16,
    size: int = 224,
    workers: list[int] = [1, 2, 4],  # noqa: B006 - read by the command line alone
    rounds: int = 3,
    index_file: Path | None = None,
) -> None:
    """Print a line each.

    Args:
        folder: Photographs.
        images: How many of them; they are read again and again.
        batch_size: Images a batch.
        size: Side of a view.
        workers: Numbers of loader processes.
        rounds: Of every number and way.
        index_file: Only load this index, and print how many MB it takes.
    """
    if index_file is not None:
        print(resident_after_loading(index_file))
        return
    records = read_folder(folder)
    records = records.subset(range(min(images, len(records))))
    sets: dict[str, Dataset[Any]] = {
        "ours": ViewDataset(records, BlockViews(size)),
        "author's": PilViews(records, size),
    }
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for number in workers:
            for name, dataset in sets.items():
                rates.setdefault((name, number), []).append(images_per_second(dataset, batch_size, number))
    for (name, number), values in rates.items():
        print(f"{name:9s} {number} worker(s): {np.median(values):7.1f} images/s ({min(values):.1f}–{max(values):.1f})")

    shape = (batch_size, 2, 4, 3, size, size)
    for name, dtype in (("ours", torch.uint8), ("author's", torch.float32)):
        seconds = sorted(seconds_on_the_way(shape, dtype) for _ in range(rounds))[rounds // 2]
        megabytes = np.prod(shape) * dtype.itemsize / 1e6
        print(f"{name:9s} a batch of {batch_size}: {megabytes:6.1f} MB shared, {1000 * seconds:6.1f} ms to the device")
    print(f"index of {COCO_IMAGES} images and {COCO_LABELS} labels: {index_memory():.0f} MB in a process of its own")


def images_per_second(dataset: Dataset[Any], batch_size: int, workers: int) -> float:
    """From the second batch that arrives to the last, over three passes, so that no start-up counts."""
    passes = torch.utils.data.ConcatDataset([dataset] * 3)
    loader = DataLoader(passes, batch_size, num_workers=workers, worker_init_fn=one_thread)
    batches = iter(loader)
    for _ in range(2 * workers):  # those that the workers made beforehand
        next(batches)
    began, count = time.perf_counter(), 0
    for batch in batches:
        count += len(batch["views"] if isinstance(batch, dict) else batch[0])
    return count / (time.perf_counter() - began)


def one_thread(_worker: int) -> None:
    import cv2

    cv2.setNumThreads(0)


def seconds_on_the_way(shape: tuple[int, ...], dtype: torch.dtype, count: int = 12) -> float:
    """Seconds a finished batch takes from a worker's memory to the device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = DataLoader(Finished(shape, dtype, count), batch_size=None, num_workers=1, pin_memory=device.type == "cuda")
    batches = iter(loader)
    next(batches).to(device)
    began = time.perf_counter()
    for batch in batches:
        batch.to(device, non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / (count - 1)


def index_memory() -> float:
    """MB of records of COCO's size, as a spawned worker holds them."""
    labels = np.random.default_rng(0).random((COCO_IMAGES, COCO_LABELS)) < 0.036
    records = Records(
        [f"train2017/{index:012d}.jpg" for index in range(COCO_IMAGES)], labels, list(map(str, range(80)))
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        path.write_bytes(pickle.dumps(records))
        words = [sys.executable, __file__, ".", "--index_file", str(path)]
        return float(subprocess.run(words, check=True, capture_output=True).stdout)


def resident_after_loading(path: Path) -> float:
    """MB by which this process grows (Linux)."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    records = pickle.loads(path.read_bytes())
    records.path(len(records) - 1)
    return (resident() - before) / 1e6


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
