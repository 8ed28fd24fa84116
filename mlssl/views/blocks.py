"""Block-wise augmented views of one image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mlssl.views.draws import NUM_UNIFORMS, draw_operations
from mlssl.views.grid import Box, block_grid
from mlssl.views.photometric import BRANCH_RECIPES, Recipe, check_channels, check_size

if TYPE_CHECKING:
    from mlssl.views.pixels import Renderer


class BlockViews:
    """Cut an image in K = rows · cols overlapping blocks and augment each once by each of A branches.

    A call draws from the generator that it is given and from nothing else. Copies sent to other processes carry the
    arguments only. Two threads must not call one object at once.

    Args:
        size: Side S of a view in pixels, at least 16.
        rows: Blocks from top to bottom, at least 1.
        cols: Blocks from left to right, at least 1.
        overlap: Fraction of the image's side that a block is longer than 1/rows and 1/cols of it, 0 to 0.5; see
            `block_grid`.
        recipes: One recipe a branch; by default the two of the method.
        channels: C, at least 1. With three, taken as RGB, all steps of a recipe apply; see `branch_recipe` for others.

    Raises:
        ValueError: If an argument lies outside its range.

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
        recipes: Sequence[Recipe] = BRANCH_RECIPES,
        channels: int = 3,
    ) -> None:
        check_size(size)
        check_channels(channels)
        if len(recipes) < 1:
            raise ValueError("got no recipe, expected one for each branch: leave recipes out for the method's two")
        block_grid(1, 1, rows, cols, overlap)  # raises here, not at the first image
        self.size = size
        self.rows = rows
        self.cols = cols
        self.overlap = overlap
        self.recipes = tuple(recipes)
        self.channels = channels
        self._renderer: Renderer | None = None

    @property
    def num_blocks(self) -> int:
        """K, the number of blocks of an image."""
        return self.rows * self.cols

    @property
    def num_branches(self) -> int:
        """A, the number of branches."""
        return len(self.recipes)

    def boxes(self, height: int, width: int) -> list[Box]:
        """Give the K blocks of an image of this height and width, row by row."""
        return block_grid(height, width, self.rows, self.cols, self.overlap)

    def __call__(self, image: np.ndarray, generator: np.random.Generator | None = None) -> torch.Tensor:
        """Augment every block by every branch.

        Args:
            image: RGB or C other channels, uint8 (H, W, C), at least one pixel; left as it is.
            generator: The source of all draws: the same state gives the same views. None draws from fresh entropy.

        Returns:
            uint8 (A, K, C, S, S), contiguous; blocks row by row.

        Raises:
            TypeError: If the image is no uint8 array.
            ValueError: If its shape is not (H, W, C).
        """
        _check_image(image, self.channels)
        if generator is None:
            generator = np.random.default_rng()
        if self._renderer is None:
            from mlssl.views.pixels import Renderer  # imports OpenCV, which changes the process's environment

            self._renderer = Renderer(self.size, self.channels)
        uniforms = generator.random((self.num_branches, self.num_blocks, NUM_UNIFORMS)).tolist()
        views = np.empty((self.num_branches, self.num_blocks, self.channels, self.size, self.size), np.uint8)
        for k, (top, left, height, width) in enumerate(self.boxes(*image.shape[:2])):
            block = image[top : top + height, left : left + width]
            for branch, recipe in enumerate(self.recipes):
                operations = draw_operations(recipe, height, width, self.size, uniforms[branch][k])
                self._renderer(block, operations, views[branch, k])
        return torch.from_numpy(views)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_renderer": None}


def _check_image(image: object, channels: int) -> None:
    remedy = "np.asarray(pil_image.convert('RGB'))" if channels == 3 else "pixels scaled to 0-255"
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        given = f"dtype {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"got an image of {given}, expected a uint8 array (H, W, {channels}): pass {remedy}")
    if image.ndim != 3 or image.shape[2] != channels or image.size == 0:
        raise ValueError(
            f"got an image of shape {image.shape}, expected (H, W, {channels}) with at least one pixel: "
            f"pass {remedy}, or BlockViews(channels=…)"
        )
