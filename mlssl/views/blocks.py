"""Block-wise augmented views of one image."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlssl.views.branches import Branch, BranchSetting, branch_name, resolve_branches
from mlssl.views.grid import Box, block_grid
from mlssl.views.local_views import CROP_ASPECT, LocalViews, resolve_local_views
from mlssl.views.recipe import Recipe
from mlssl.views.regions import Regions, resolve_regions
from mlssl.views.streams import LOCAL_VIEWS, Streams

if TYPE_CHECKING:
    import torch

    from mlssl.views.painters import Painter, Shown

MIN_SIZE = 16


class _Tools(NamedTuple):
    """Objects a process creates at its first image; never sent to other processes."""

    streams: Streams
    branches: list[Painter]
    local_branch: Painter | None


class BlockViews:
    """Cut an image into K overlapping blocks, and augment each block once with each of A branches.

    A branch is a `Recipe`, an albumentations pipeline, or any function (block, generator) -> pixels: see
    `mlssl.views.branches`. A call takes one number from the given generator and uses no other random state. That
    number, the branch and the block determine the random numbers of a view, so a branch cannot change the samples of
    another. Copies sent to other processes contain only the arguments. Not thread-safe.

    Args:
        size: Side S of a view in pixels, at least 16.
        rows: Blocks from top to bottom, at least 1.
        cols: Blocks from left to right, at least 1.
        overlap: Fraction of the image side added to a block's 1/rows and 1/cols of it, 0 to 0.5; see `block_grid`.
        branches: Name of a preset (`paper`, `soft`, `gray`, `overhead`), or a list of A ≥ 1 branches.
        regions: Function (height, width) -> boxes of the blocks, the same number for every size, instead of the grid;
            its import path; or {class_path, init_args}.
        local_views: V additional small views of the whole image: {"count": V, "size": s, "area": (0.05, 0.3), "branch":
            a branch}; by default s is 96 and the branch is the first of `branches`.
        channels: C, at least 1. Three channels are RGB, and all operations of a Recipe apply. For any other number
            saturation, hue and gray are skipped, and contrast is relative to each channel's mean.

    Raises:
        ValueError: An argument is out of range, a name is misspelt, or a branch does not return (C, S, S).
        TypeError: An argument or the output of a branch has the wrong type.

    Example:
        >>> views = BlockViews(size=32)
        >>> views(np.zeros((40, 60, 3), np.uint8), np.random.default_rng(0)).shape
        torch.Size([2, 4, 3, 32, 32])
    """

    def __init__(
        self,
        size: int = 224,
        rows: int = 2,
        cols: int = 2,
        overlap: float = 0.2,
        branches: str | Sequence[BranchSetting] = "paper",
        regions: Regions | str | Mapping[str, Any] | None = None,
        local_views: Mapping[str, Any] | None = None,
        channels: int = 3,
    ) -> None:
        _check_size(size)
        if channels < 1:
            raise ValueError(
                f"got channels={channels}, expected at least 1: pass channels=3 for RGB or channels=1 for gray"
            )
        block_grid(1, 1, rows, cols, overlap)  # raises here, not at the first image
        if regions is not None and (rows, cols, overlap) != (2, 2, 0.2):
            raise ValueError(
                f"got regions together with a grid of rows={rows}, cols={cols} and overlap={overlap}: leave out one"
            )
        self.size = size
        self.rows = rows
        self.cols = cols
        self.overlap = overlap
        self.channels = channels
        self.branches: tuple[Branch, ...] = resolve_branches(branches)
        self.regions = None if regions is None else resolve_regions(regions)
        self.local_views: LocalViews | None = (
            None if local_views is None else resolve_local_views(local_views, self.branches[0])
        )
        self._tools: _Tools | None = None
        self._try_branches()

    @property
    def num_blocks(self) -> int:
        """K, the number of blocks of an image."""
        if self.regions is None:
            return self.rows * self.cols
        assert self.regions.number is not None
        return self.regions.number

    @property
    def num_branches(self) -> int:
        """A, the number of branches."""
        return len(self.branches)

    def boxes(self, height: int, width: int) -> list[Box]:
        """The K blocks of an image of this size; grid blocks are row-major."""
        if self.regions is None:
            return block_grid(height, width, self.rows, self.cols, self.overlap)
        return self.regions(height, width)

    def __call__(self, image: np.ndarray, generator: np.random.Generator | None = None) -> torch.Tensor:
        """Augment every block with every branch.

        Args:
            image: RGB or C other channels, uint8 (H, W, C), at least one pixel; not modified.
            generator: Source of all randomness: the same state gives the same views. None uses fresh entropy.

        Returns:
            uint8 (A, K, C, S, S), contiguous; blocks in the order of `boxes`.

        Raises:
            TypeError: The image is not a uint8 array, or a branch does not return uint8 pixels.
            ValueError: The image's shape is not (H, W, C), or a branch does not return (C, S, S).
        """
        import torch

        return torch.from_numpy(self._of_blocks(image, _root(image, generator, self.channels))[0])

    def with_boxes(self, image: np.ndarray, generator: np.random.Generator | None = None) -> dict[str, torch.Tensor]:
        """Return the views and their boxes.

        Arguments and errors as for a call.

        Returns:
            `views` uint8 (A, K, C, S, S), and `boxes` float32 (A, K, 4): top, left, height and width of each view's
            crop, as fractions of the image; flips and rotations do not change them. With `local_views` also
            `local_views` uint8 (V, C, s, s) and `local_boxes` float32 (V, 4).
        """
        import torch

        return {name: torch.from_numpy(array) for name, array in self.arrays(image, generator).items()}

    def arrays(self, image: np.ndarray, generator: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """The output of `with_boxes` as NumPy arrays, without importing torch."""
        root = _root(image, generator, self.channels)
        views, boxes = self._of_blocks(image, root)
        given = {"views": views, "boxes": boxes}
        if self.local_views is not None:
            given["local_views"], given["local_boxes"] = self._of_the_image(image, root, self.local_views)
        return given

    def with_size(self, size: int) -> BlockViews:
        """The same views at another size; local views keep theirs.

        Raises:
            ValueError: The size is below 16, or a branch is not a Recipe: only a Recipe can be rendered at any size.
        """
        _check_size(size)
        for index, branch in enumerate(self.branches):
            if not isinstance(branch, Recipe):
                raise ValueError(
                    f"{branch_name(index, branch)} is not a Recipe and returns views of {self.size} pixels, but {size} "
                    "was requested: keep the size, or use only Recipes"
                )
        other = copy.copy(self)
        other.size, other._tools = size, None
        return other

    def _of_blocks(self, image: np.ndarray, root: int) -> tuple[np.ndarray, np.ndarray]:
        """Views (A, K, C, S, S) and boxes (A, K, 4)."""
        streams, branches, _ = self._tools or self._make_tools()
        rows, cols = image.shape[:2]
        blocks = self.boxes(rows, cols)
        views = np.empty((len(branches), len(blocks), self.channels, self.size, self.size), np.uint8)
        boxes: list[list[Shown]] = [[] for _ in branches]
        randomness = [paint.randomness(streams, root, a, len(blocks)) for a, paint in enumerate(branches)]
        for k, (top, left, height, width) in enumerate(blocks):
            block = image[top : top + height, left : left + width]
            for a, paint in enumerate(branches):
                y, x, h, w = paint(block, randomness[a][k], views[a, k])
                shown = (top + y * height) / rows, (left + x * width) / cols, h * height / rows, w * width / cols
                boxes[a].append(shown)
        return views, np.array(boxes, np.float32)

    def _of_the_image(self, image: np.ndarray, root: int, local: LocalViews) -> tuple[np.ndarray, np.ndarray]:
        """Local views (V, C, s, s) and their boxes (V, 4)."""
        streams, _, paint = self._tools or self._make_tools()
        assert paint is not None
        views = np.empty((local.count, self.channels, local.size, local.size), np.uint8)
        boxes = np.empty((local.count, 4), np.float32)
        randomness = paint.randomness(streams, root, LOCAL_VIEWS, local.count)
        for v, view in enumerate(views):
            boxes[v] = paint(image, randomness[v], view)
        return views, boxes

    def _make_tools(self) -> _Tools:
        from mlssl.views.painters import CustomPainter, RecipePainter  # imports OpenCV, which changes the environment
        from mlssl.views.pixels import Renderer

        renderer = Renderer(self.size, self.channels)
        branches: list[Painter] = [
            RecipePainter(branch, renderer)
            if isinstance(branch, Recipe)
            else CustomPainter(branch, branch_name(index, branch))
            for index, branch in enumerate(self.branches)
        ]
        paint: Painter | None = None
        local = self.local_views
        if local is not None:
            branch = local.branch
            paint = (
                RecipePainter(branch, Renderer(local.size, self.channels))
                if isinstance(branch, Recipe)
                else CustomPainter(branch, _LOCAL_BRANCH, (local.area, CROP_ASPECT))
            )
        self._tools = _Tools(Streams(), branches, paint)
        return self._tools

    def _try_branches(self) -> None:
        tried = [(branch, branch_name(a, branch), self.size) for a, branch in enumerate(self.branches)]
        if self.local_views is not None:
            tried.append((self.local_views.branch, _LOCAL_BRANCH, self.local_views.size))
        for branch, name, size in tried:
            if not isinstance(branch, Recipe):
                from mlssl.views.painters import try_branch

                try_branch(branch, name, size, self.channels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tools": None}


_LOCAL_BRANCH = "the branch of local_views (the first branch by default)"


def _check_size(size: int) -> None:
    if size < MIN_SIZE:
        raise ValueError(
            f"got size={size}, expected views of at least {MIN_SIZE} × {MIN_SIZE} pixels: "
            "pass size=224, or size=64 for small images"
        )


def _root(image: object, generator: np.random.Generator | None, channels: int) -> int:
    """Check an image and return the number that determines all its random streams."""
    remedy = "np.asarray(pil_image.convert('RGB'))" if channels == 3 else "pixels scaled to 0-255"
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        given = f"dtype {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"got an image of {given}, expected a uint8 array (H, W, {channels}): pass {remedy}")
    if image.ndim != 3 or image.shape[2] != channels or image.size == 0:
        raise ValueError(
            f"got an image of shape {image.shape}, expected (H, W, {channels}) with at least one pixel: "
            f"pass {remedy}, or BlockViews(channels=…)"
        )
    if generator is None:
        generator = np.random.default_rng()
    return int(generator.integers(2**64, dtype=np.uint64))
