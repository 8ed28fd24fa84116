"""Search by features: the parts of an image, and the images, that a backbone finds similar."""

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
"""Rows and columns of the patches of a heat map."""

PATCH_OVERLAP = 0.12
"""Overlap of the patches; a patch is slightly less than a quarter of each side."""


class Similarities(NamedTuple):
    """Similarity of the parts of one image in a backbone's features.

    `blocks` is (K, K), cosines of the blocks' features; `maps` (K, H', W'), for each block the mean cosine with the
    patches that cover a point of the image, on a raster as fine as the patches allow.
    """

    blocks: Tensor
    maps: Tensor


def block_similarities(model: FeatureNetwork, image: ImageArray, boxes: Sequence[Box], size: int = 224) -> Similarities:
    """Compare the blocks of an image with each other, and each with small patches of the whole image.

    Args:
        model: `MultiLabelSSLModule`, or any object with `backbone` and `normalize`, as for `extract_features`.
        image: RGB, uint8 (H, W, 3).
        boxes: The K blocks, of `mlssl.views.grid.block_grid`.
        size: Side to which blocks and patches are resized, without augmentation.
    """
    height, width = image.shape[:2]
    patches = block_grid(height, width, PATCHES, PATCHES, PATCH_OVERLAP)
    f = F.normalize(_features(model, _crops(image, [*boxes, *patches], size)), dim=1)
    of_blocks, of_patches = f[: len(boxes)], f[len(boxes) :]
    cosines = of_blocks @ of_patches.T
    raster = min(height, 4 * PATCHES), min(width, 4 * PATCHES)
    total, count = torch.zeros(len(boxes), *raster), torch.zeros(raster)
    for position, box in enumerate(patches):
        rows = slice(box.top * raster[0] // height, -(-(box.top + box.height) * raster[0] // height))
        columns = slice(box.left * raster[1] // width, -(-(box.left + box.width) * raster[1] // width))
        total[:, rows, columns] += cosines[:, position, None, None]
        count[rows, columns] += 1
    return Similarities(of_blocks @ of_blocks.T, total / count)


class Similar(NamedTuple):
    """Nearest images to an image or to a block of it: indices into the records, boxes of the block, cosines."""

    indices: list[int]
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
    """Find the images most similar to an image, or to a block of it by their most similar block.

    Args:
        model: As for :func:`block_similarities`.
        image: RGB, uint8 (H, W, 3).
        records: Images to search.
        k: Images to find, at least 1; all images if there are fewer.
        block: Index of the block of the image, 0 to rows · cols − 1; None compares whole images.
        rows: Rows of the grid.
        cols: Columns of the grid.
        overlap: Overlap of the blocks.
        size: Side to which images or blocks are resized.
        leave_out: Index of the query image in the records.
        batch_size: Images per step.
        num_workers: Loader processes.
        progress: Whether to show a bar with images per second.

    Raises:
        ValueError: If there is no such block, k is below 1, or nothing is left to search.
    """
    if k < 1:
        raise ValueError(f"k={k} was given: pass at least 1.")
    if block is not None and not 0 <= block < rows * cols:
        raise ValueError(f"block={block} was given, but a grid of {rows} × {cols} has blocks 0 to {rows * cols - 1}.")
    indices = [index for index in range(len(records)) if index != leave_out]
    if not indices:
        raise ValueError("the folder contains no image other than the query: pass a folder with more images.")
    grid = (1, 1, 0.0) if block is None else (rows, cols, overlap)
    query_box = _boxes(image, grid)[block or 0]
    query = F.normalize(_features(model, _crops(image, [query_box], size)), dim=1)
    cosines = []
    loader = DataLoader(_Blocks(records.subset(indices), grid, size), batch_size, num_workers=num_workers)
    with progress_bar(total=len(indices), disable=not progress, unit=" images", desc="features") as bar:
        for crops in loader:
            f = F.normalize(_features(model, crops.flatten(0, 1)), dim=1)
            cosines.append((f @ query.T).view(crops.shape[:2]))
            bar.update(len(crops))
    best = torch.cat(cosines).max(dim=1)
    nearest = best.values.topk(min(k, len(indices)))
    found = [indices[position] for position in nearest.indices.tolist()]
    boxes = [
        _boxes(records.image(index), grid)[int(best.indices[position])]
        for index, position in zip(found, nearest.indices.tolist(), strict=True)
    ]
    return Similar(found, boxes, nearest.values.tolist())


def identical_files(query: Path, records: Records, indices: Sequence[int]) -> list[str]:
    """A remark for each image whose file is identical to the query or to an earlier image.

    Args:
        query: File of the query image.
        records: The searched images.
        indices: Indices of the found images, in order.

    Returns:
        "identical to the query", "identical to number N" with N from 1 in the order of `indices`, or "".
    """
    seen, remarks = {_digest(query): "identical to the query"}, []
    for number, index in enumerate(indices, start=1):
        digest = _digest(records.path(index))
        remarks.append(seen.get(digest, ""))
        seen.setdefault(digest, f"identical to number {number}")
    return remarks


def _digest(path: Path) -> str:
    """Digest of a file's bytes; of the name of an image that is not a file."""
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
