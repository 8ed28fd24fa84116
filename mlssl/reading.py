"""Reading a representation: which parts of a picture, and which pictures, does a backbone find alike?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mlssl.atomic import written_aside
from mlssl.data.images import ImageArray
from mlssl.data.records import Records
from mlssl.evaluation.features import eval_mode, image_features
from mlssl.views.grid import Box, block_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PATCHES = 9
"""Rows and columns of the patches that a heat map is made of."""

PATCH_OVERLAP = 0.12
"""Which makes a patch a little less than a quarter of each side."""


class Similarities(NamedTuple):
    """How alike a backbone finds the parts of one image.

    `blocks` is (K, K), cosines of the blocks' features; `maps` (K, H', W'), for each block the mean cosine with the
    patches that cover a place of the image, on a raster as fine as the patches allow.
    """

    blocks: Tensor
    maps: Tensor


def block_similarities(model: Any, image: ImageArray, boxes: Sequence[Box], size: int = 224) -> Similarities:
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


def draw_similarities(
    image: ImageArray,
    boxes: Sequence[Box],
    similarities: Similarities,
    path: str | os.PathLike[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the cosines of the blocks as a table, and for each block a heat map over the picture.

    Args:
        image: RGB, uint8 (H, W, 3).
        boxes: The K blocks.
        similarities: Of :func:`block_similarities`.
        path: PNG to write; None writes nothing.
        title: A line above the picture.

    Returns:
        The figure, which a notebook shows.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    number = len(boxes)
    columns = min(4, number)
    rows = -(-number // columns)
    height, width = image.shape[:2]
    panel = 2.6
    figure = Figure(
        figsize=(panel * (columns + 1.25), panel * rows * min(1.3, height / width) + 0.9), layout="constrained"
    )
    if title:
        figure.suptitle(title, fontsize=10)
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.25, columns))
    table_part, maps_part = parts
    table = table_part.subplots()
    low, high = similarities.maps.min().item(), similarities.maps.max().item()
    values = similarities.blocks.cpu().numpy()
    table.imshow(values, cmap="viridis", vmin=values.min().item(), vmax=1)
    table.set(xticks=range(number), yticks=range(number), xlabel="block", ylabel="block")
    table.set_title("cosine of two blocks", fontsize=9)
    if number <= 9:
        middle = (values.min().item() + 1) / 2
        for row, column in np.ndindex(number, number):
            value = values[row, column].item()
            table.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="w" if value < middle else "k"
            )
    grid = maps_part.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        axes.set_axis_off()
        if place >= number:
            continue
        gray = image @ np.array([0.299, 0.587, 0.114])
        axes.imshow(gray, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
        drawn = axes.imshow(
            similarities.maps[place].cpu().numpy(),
            cmap="turbo",
            alpha=0.5,
            vmin=low,
            vmax=high,
            extent=(0, width, height, 0),
            interpolation="bilinear",
        )
        box = boxes[place]
        axes.add_patch(
            Rectangle((box.left, box.top), box.width, box.height, fill=False, edgecolor="white", linewidth=2)
        )
        axes.set_title(f"like block {place}", fontsize=9)
    maps_part.colorbar(drawn, ax=grid, shrink=0.8, label="cosine").solids.set_alpha(1)
    _save(figure, path)
    return figure


class Found(NamedTuple):
    """What is nearest to an image or to a block of it: lines of the records, places of the block, cosines."""

    lines: list[int]
    boxes: list[Box]
    cosines: list[float]


def find_similar(
    model: Any,
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
) -> Found:
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
        leave_out: Line of the records that holds the image itself.
        batch_size: Images at a time.
        num_workers: Loader processes.
        progress: Whether to show a bar with images a second.

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
    with tqdm(total=len(lines), disable=not progress, unit=" images", desc="features") as bar:
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
    return Found(found, boxes, nearest.values.tolist())


def draw_similar(
    image: ImageArray,
    box: Box | None,
    records: Records,
    found: Found,
    path: str | os.PathLike[str] | None = None,
    title: str = "",
) -> Figure:
    """Draw an image and what was found for it, nearest first, with the blocks framed where blocks were compared.

    Args:
        image: RGB, uint8 (H, W, 3).
        box: Block of the image that was compared; None for the whole.
        records: Images that were searched.
        found: Of :func:`find_similar`.
        path: PNG to write; None writes nothing.
        title: Below the image itself.

    Returns:
        The figure, which a notebook shows.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = min(5, len(found.lines) + 1)
    rows = -(-(len(found.lines) + 1) // columns)
    figure = Figure(figsize=(2.1 * columns, 1.95 * rows), layout="constrained")
    pictures = [(image, box, title)]
    for line, other, cosine in zip(*found, strict=True):
        pictures.append((records.image(line), other if box else None, f"{cosine:.3f}  {records.path(line).name}"))
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for place, (axes, (pixels, frame, words)) in enumerate(zip(figure.axes, pictures, strict=False)):
        axes.imshow(pixels)
        axes.set_title(words[:26], fontsize=8, fontweight="bold" if place == 0 else "normal")
        if frame:
            corner, width, height = (frame.left, frame.top), frame.width - 1, frame.height - 1
            axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="#f07800", linewidth=2.5))
    _save(figure, path)
    return figure


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


def _features(model: Any, crops: Tensor) -> Tensor:
    with eval_mode(model.backbone):
        return image_features(model.backbone, model.normalize, crops).cpu()


def _save(figure: Figure, path: str | os.PathLike[str] | None) -> None:
    if path is not None:
        with written_aside(path) as aside:
            figure.savefig(aside, dpi=110)
