"""Milliseconds per image from file to views, ours against albumentations, the author's way and, if installed, lightly.

python examples/benchmarks/views.py FOLDER

FOLDER contains photographs. All run on one core, by turns, a pass over the images each, so that they meet one machine;
every way has one pass to warm up. Printed are median and quartiles over passes of the mean milliseconds an image.
"""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from albumentations_way import pipeline
from authors_way import PilViews
from jsonargparse import auto_cli
from PIL import Image

from mlssl.data.datasets import ViewDataset
from mlssl.data.decoding import decode_rgb
from mlssl.data.readers.folder import read_folder
from mlssl.data.records import Records
from mlssl.views.blocks import BlockViews
from mlssl.views.grid import block_grid
from mlssl.views.recipe import PRESETS


def main(folder: Path, images: int = 64, size: int = 224, overlap: float = 0.2, passes: int = 7) -> None:
    """Print one line a way.

    Args:
        folder: Photographs.
        images: How many of them.
        size: Side of a view.
        overlap: Of the blocks.
        passes: Over all images.
    """
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    records = read_folder(folder)
    records = records.subset(range(min(images, len(records))))
    ways = {
        "decoding alone (Pillow)": lambda index: np.asarray(Image.open(records.path(index)).convert("RGB")),
        "decoding alone (ours)": lambda index: decode_rgb(records.path(index)),
        "albumentations on uint8": albumentations_way(records, size, overlap),
        "the author's way": PilViews(records, size, overlap=overlap).__getitem__,
        **lightly_way(records, size, overlap),
        "ours": ViewDataset(records, BlockViews(size, overlap=overlap)).__getitem__,
    }
    seconds = {name: np.zeros((passes, len(records))) for name in ways}
    for number in range(-1, passes):
        for name, way in ways.items():
            for index in range(len(records)):
                began = time.perf_counter()
                way(index)
                if number >= 0:
                    seconds[name][number, index] = time.perf_counter() - began
    print(
        f"{platform.processor() or platform.machine()}, one core; {len(records)} images, {size} × {size}, 8 views each"
    )
    ours = np.median(1000 * seconds["ours"].mean(axis=1))
    for name, of_way in seconds.items():
        low, median, high = np.percentile(1000 * of_way.mean(axis=1), [25, 50, 75])
        print(f"{name:26s} {median:6.2f} ms an image ({low:.2f}–{high:.2f}), {median / ours:5.2f} times ours")


def albumentations_way(records: Records, size: int, overlap: float) -> Callable[[int], object]:
    """The recipe by albumentations, whose pixels stay 8 bits wide."""
    pipelines = [pipeline(recipe, size) for recipe in PRESETS["paper"]]

    def views(index: int) -> torch.Tensor:
        image = decode_rgb(records.path(index))
        boxes = block_grid(*image.shape[:2], overlap=overlap)
        blocks = [image[b.top : b.top + b.height, b.left : b.left + b.width] for b in boxes]
        arrays = [one(image=block)["image"].transpose(2, 0, 1) for one in pipelines for block in blocks]
        return torch.from_numpy(np.stack(arrays))

    return views


def lightly_way(records: Records, size: int, overlap: float) -> dict[str, Callable[[int], object]]:
    """The SimCLR transform of lightly with the recipe's numbers; nothing where it is not installed."""
    try:
        from lightly.transforms.simclr_transform import SimCLRViewTransform
    except ImportError:
        return {}
    branches = [
        SimCLRViewTransform(
            input_size=size, cj_prob=0.8, cj_strength=1.0, cj_bright=0.4, cj_contrast=0.4, cj_sat=0.4, cj_hue=0.1,
            min_scale=0.2, random_gray_scale=0.2, gaussian_blur=blur, sigmas=(0.1, 2.0), hf_prob=0.5,
        )
        for blur in (0.5, 0.1)
    ]  # fmt: skip

    def views(index: int) -> torch.Tensor:
        image = Image.open(records.path(index)).convert("RGB")
        boxes = block_grid(image.height, image.width, overlap=overlap)
        blocks = [image.crop((b.left, b.top, b.left + b.width, b.top + b.height)) for b in boxes]
        return torch.stack([branch(block) for branch in branches for block in blocks])

    return {"lightly (no solarize)": views}


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
