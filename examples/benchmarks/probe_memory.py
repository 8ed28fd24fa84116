"""How much memory the linear probe takes beside the file of its features, and how that grows.

    python examples/benchmarks/probe_memory.py [--images 20000 40000 80000] [--width 2048] [--labels 80]

Made features of float16 lie in a file that is mapped. Each size runs in a process of its own. The features are read
anew in every pass, as those of 1,000,000 × 2048 are, which are more than `IN_MEMORY_BYTES`.

"beside" is the largest resident memory of the process, less what it had before the probe began, less the file itself,
whose pages count as resident once they are read.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from mlssl.evaluation import logistic
from mlssl.evaluation.features import Features
from mlssl.evaluation.logistic import LOGIT_BYTES
from mlssl.evaluation.probe import linear_probe

TEST_IMAGES = 1000
STRENGTHS = (0.01, 0.1, 1.0)
MEBI = 2**20


def make(folder: str, images: int, width: int, labels: int) -> None:
    """Write features and labels; in a process of its own, whose memory is not the probe's."""
    generator = np.random.default_rng(0)
    made = np.lib.format.open_memmap(Path(folder) / "features.npy", "w+", np.float16, (images, width))
    targets = np.zeros((images, labels), dtype=np.int8)
    causes = generator.standard_normal((width, labels)).astype(np.float32) / width**0.5
    for start in range(0, images, 4096):
        piece = generator.standard_normal((min(4096, images - start), width)).astype(np.float32)
        made[start : start + len(piece)] = piece
        targets[start : start + len(piece)] = piece @ causes + generator.standard_normal((len(piece), labels)) > 1.5
    made.flush()
    np.save(Path(folder) / "labels.npy", targets)


def measure(folder: str) -> tuple[float, float]:
    """Bytes beside the file, and seconds."""
    logistic.IN_MEMORY_BYTES = 0
    path = Path(folder) / "features.npy"
    features, labels = (
        torch.from_numpy(np.load(Path(folder) / f"{name}.npy", mmap_mode="c")) for name in ("features", "labels")
    )
    train = Features(features, labels, torch.arange(len(features)))
    test = Features(features[:TEST_IMAGES], labels[:TEST_IMAGES], torch.arange(TEST_IMAGES))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    linear_probe(train, test, strengths=STRENGTHS, num_resamples=0, device="cpu")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return after - before - path.stat().st_size, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[20_000, 40_000, 80_000])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--labels", type=int, default=80)
    parser.add_argument("--folder", help="where the file lies for a while; by default the folder for temporary files")
    arguments = parser.parse_args()
    print(
        f"{arguments.width} features, {arguments.labels} labels, {len(STRENGTHS)} strengths, logits of one group of "
        f"labels at most {LOGIT_BYTES / MEBI:.0f} MiB"
    )
    print("  images  file MiB  beside MiB  seconds")
    for images in arguments.images:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            context = multiprocessing.get_context("spawn")
            with context.Pool(1) as pool:
                pool.apply(make, (folder, images, arguments.width, arguments.labels))
            with context.Pool(1) as pool:
                beside, seconds = pool.apply(measure, (folder,))
        file = images * arguments.width * 2
        print(f"{images:8}  {file / MEBI:8.0f}  {beside / MEBI:10.0f}  {seconds:7.1f}", flush=True)


if __name__ == "__main__":
    main()
