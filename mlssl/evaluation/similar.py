"""Search by features: which parts of an image, and which images, does a backbone find similar?"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mlssl.bars import progress_bar
from mlssl.contracts import FeatureNetwork
from mlssl.data.decoding import ImageArray
from mlssl.data.records import Records
from mlssl.evaluation.features import image_features
from mlssl.modes import eval_mode
from mlssl.views.grid import Box, block_grid

PATCHES = 9
"""Rows and columns of the patches that a heat map is made of."""

PATCH_OVERLAP = 0.12
"""Which makes a patch a little less than a quarter of each side."""


class Similarities(NamedTuple):
    """How alike a backbone finds the parts of one image.

    `blocks` is (K, K), cosines of the blocks' features; `maps` (K, H', W'), for each block the mean cosine with the
    patches that cover a point of the image, on a raster as fine as the patches allow.
    """

    blocks: Tensor
    maps: Tensor


def block_similarities(model: FeatureNetwork, image: ImageArray, boxes: Sequence[Box], size: int = 224) -> Similarities:
    """Compare the blocks of an image with one another, and each with small patches of the whole image.

    Args:
        model: `MultiLabelSSLModule`, or any object with `backbone` and `normalize`, as for `extract_features`.
        image: RGB, uint8 (H, W, 3).
        boxes: The K blocks, of `mlssl.views.grid.block_grid`.
        size: Side that blocks and patches are resized to, without augmentation.
    """
    height, width = image.shape[:2]
    patches = block_grid(height, width, PATCHES, PATCHES, PATCH_OVERLAP)
    f = F.normalize(_features(model, _crops(image, [*boxes, *patches], size)), dim=1)
    of_blocks, of_patches = f[: len(boxes)], f[len(boxes) :]
    cosines = of_blocks @ of_patches.T
    raster = min(height, 4 * PATCHES), min(width, 4 * PATCHES)
    total, count = torch.zeros(len(boxes), *raster), torch.zeros(raster)
    for place, box in enumerate(patches):
        rows = slice(box.top * raster[0] // height, -(-(box.top + box.height) * raster[0] // height))
        columns = slice(box.left * raster[1] // width, -(-(box.left + box.width) * raster[1] // width))
        total[:, rows, columns] += cosines[:, place, None, None]
        count[rows, columns] += 1
    return Similarities(of_blocks @ of_blocks.T, total / count)


class Similar(NamedTuple):
    """Nearest to an image or to a block of it: indices into the records, boxes of the block, cosines."""

    lines: list[int]
    boxes: list[Box]
    cosines: list[float]


def find_similar(
    model: FeatureNetwork,
    image: ImageArray,
    records: Records,
    k: int = 8,
    *,
    block: int | None = None,
    rows: int = 2,
    cols: int = 2,
    overlap: float = 0.2,
    size: int = 224,
    leave_out: int | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    progress: bool = False,
) -> Similar:
    """Find the images most like an image, or the blocks most like a block of it; of an image its nearest block only.

    Args:
        model: As for :func:`block_similarities`.
        image: RGB, uint8 (H, W, 3).
        records: Images to search.
        k: Images to find, at least 1; all there are where these are fewer.
        block: Number of the block of the image, 0 to rows · cols − 1; None takes the whole image, and whole images.
        rows: Of the grid.
        cols: Of the grid.
        overlap: Of the blocks.
        size: Side that images or blocks are resized to.
        leave_out: Index of the image itself in the records.
        batch_size: Images at a time.
        num_workers: Loader processes.
        progress: Whether to show a bar with images per second.

    Raises:
        ValueError: If there is no such block, k is below 1, or nothing is left to search.
    """
    if k < 1:
        raise ValueError(f"k={k} images were asked for: pass at least 1.")
    if block is not None and not 0 <= block < rows * cols:
        raise ValueError(f"block={block} was given, and a grid of {rows} × {cols} has blocks 0 to {rows * cols - 1}.")
    lines = [line for line in range(len(records)) if line != leave_out]
    if not lines:
        raise ValueError("the folder holds no image but the one to compare with: pass a folder with more images.")
    grid = (1, 1, 0.0) if block is None else (rows, cols, overlap)
    query_box = _boxes(image, grid)[block or 0]
    query = F.normalize(_features(model, _crops(image, [query_box], size)), dim=1)
    cosines = []
    loader = DataLoader(_Blocks(records.subset(lines), grid, size), batch_size, num_workers=num_workers)
    with progress_bar(total=len(lines), disable=not progress, unit=" images", desc="features") as bar:
        for crops in loader:
            f = F.normalize(_features(model, crops.flatten(0, 1)), dim=1)
            cosines.append((f @ query.T).view(crops.shape[:2]))
            bar.update(len(crops))
    best = torch.cat(cosines).max(dim=1)
    nearest = best.values.topk(min(k, len(lines)))
    found = [lines[place] for place in nearest.indices.tolist()]
    boxes = [
        _boxes(records.image(line), grid)[int(best.indices[place])]
        for line, place in zip(found, nearest.indices.tolist(), strict=True)
    ]
    return Similar(found, boxes, nearest.values.tolist())


def identical_files(query: Path, records: Records, lines: Sequence[int]) -> list[str]:
    """What files share byte by byte: a remark for each of some images.

    Args:
        query: File that was compared with.
        records: Images that were searched.
        lines: Of those that were found, in their order.

    Returns:
        "identical to the query", "identical to number N" with N from 1 in the order of `lines`, or "".
    """
    seen, remarks = {_digest(query): "identical to the query"}, []
    for number, line in enumerate(lines, start=1):
        digest = _digest(records.path(line))
        remarks.append(seen.get(digest, ""))
        seen.setdefault(digest, f"identical to number {number}")
    return remarks


def _digest(path: Path) -> str:
    """Of a file's bytes; of an image that has no file of its own, its name."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else str(path)


def _boxes(image: ImageArray, grid: tuple[int, int, float]) -> list[Box]:
    height, width = image.shape[:2]
    return block_grid(height, width, *grid)


class _Blocks(Dataset[Tensor]):
    """All blocks of an image, uint8 (K, 3, S, S)."""

    def __init__(self, records: Records, grid: tuple[int, int, float], size: int) -> None:
        self.records, self.grid, self.size = records, grid, size

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Tensor:
        image = self.records.image(index)
        return _crops(image, _boxes(image, self.grid), self.size)


def _crops(image: npt.NDArray[np.uint8], boxes: Sequence[Box], size: int) -> Tensor:
    from torchvision.transforms.v2.functional import resize

    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    crops = (pixels[:, b.top : b.top + b.height, b.left : b.left + b.width] for b in boxes)
    return torch.stack([resize(crop, [size, size], antialias=True) for crop in crops])


def _features(model: FeatureNetwork, crops: Tensor) -> Tensor:
    with eval_mode(model.backbone):
        return image_features(model.backbone, model.normalize, crops).cpu()
