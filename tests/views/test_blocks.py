"""Views of whole images: shapes, draws, pickling and what is refused."""

from __future__ import annotations

import multiprocessing
import pickle
import random
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mlssl.views.blocks import BlockViews
from mlssl.views.draws import NUM_UNIFORMS, draw_operations
from mlssl.views.grid import block_grid
from mlssl.views.photometric import BRANCH_RECIPES, Recipe
from mlssl.views.pixels import Renderer


def noise(height: int = 50, width: int = 70, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def seeded(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def first_view(views: BlockViews) -> bytes:
    """Run in another process by `test_spawned_process_draws_the_same`."""
    return views(noise(), seeded(5)).numpy().tobytes()


@pytest.fixture(scope="module")
def views() -> BlockViews:
    return BlockViews(size=32)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2, 2), (4, 2), (3, 3)])
def test_shape_type_and_layout(rows: int, cols: int) -> None:
    grid = BlockViews(size=16, rows=rows, cols=cols)
    result = grid(noise())
    assert (grid.num_branches, grid.num_blocks) == (2, rows * cols)
    assert result.shape == (2, rows * cols, 3, 16, 16)
    assert result.dtype == torch.uint8
    assert result.is_contiguous()


def test_boxes_are_the_grid() -> None:
    assert BlockViews(32, rows=3, cols=2, overlap=0.1).boxes(90, 50) == block_grid(90, 50, 3, 2, 0.1)


def test_view_k_shows_block_k() -> None:
    plain = Recipe(0.0, 0.0, crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0), jitter_probability=0.0, gray_probability=0.0)
    image = np.zeros((60, 60, 3), np.uint8)
    grid = BlockViews(size=20, rows=3, cols=3, overlap=0.0, recipes=[plain])
    for k, box in enumerate(grid.boxes(60, 60)):
        image[box.top : box.top + box.height, box.left : box.left + box.width] = (10 * k, 100, 200)
    result = grid(image)
    for k in range(9):
        assert result[0, k].flatten(1).unique(dim=1).flatten().tolist() == [10 * k, 100, 200]


def test_equals_the_draws_and_pixels_one_after_another(views: BlockViews) -> None:
    image = noise()
    uniforms = seeded(3).random((2, 4, NUM_UNIFORMS))
    slow = np.empty((2, 4, 3, 32, 32), np.uint8)
    for branch, recipe in enumerate(BRANCH_RECIPES):
        for k, (top, left, height, width) in enumerate(block_grid(*image.shape[:2])):
            block = image[top : top + height, left : left + width].copy()
            operations = draw_operations(recipe, height, width, 32, uniforms[branch, k].tolist())
            Renderer(32)(block, operations, slow[branch, k])
    torch.testing.assert_close(views(image, seeded(3)), torch.from_numpy(slow), rtol=0, atol=0)


def test_draws_depend_on_the_generator_alone(views: BlockViews) -> None:
    image = noise()
    first = views(image, seeded(1))
    views(noise(40, 40, 9), seeded(2))
    random.seed(7)
    torch.manual_seed(7)
    np.random.default_rng(7)
    assert torch.equal(views(image, seeded(1)), first)
    assert torch.equal(BlockViews(size=32)(image, seeded(1)), first)
    assert not torch.equal(views(image, seeded(2)), first)


def test_global_random_states_are_left_alone(views: BlockViews) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    views(noise())
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert after == before


def test_without_a_generator_no_two_calls_are_alike(views: BlockViews) -> None:
    image = noise()
    assert not torch.equal(views(image), views(image))


def test_blocks_and_branches_draw_independently() -> None:
    whole = BlockViews(size=32, overlap=0.5)
    result = whole(noise(), seeded(0)).flatten(0, 1)
    assert len({view.numpy().tobytes() for view in result}) == 8


def test_branches_differ_in_how_often_they_solarize() -> None:
    dark = np.full((32, 32, 3), 255, np.uint8)
    quiet: dict[str, Any] = {"jitter_probability": 0.0, "gray_probability": 0.0}
    grid = BlockViews(
        size=16, recipes=[Recipe(r.blur_probability, r.solarize_probability, **quiet) for r in BRANCH_RECIPES]
    )
    inverted = torch.stack([grid(dark, seeded(i)).flatten(2).amax(-1) == 0 for i in range(150)])
    shares = inverted.float().mean(dim=(0, 2))
    assert shares[0] == pytest.approx(0.5, abs=0.09)
    assert shares[1] == pytest.approx(0.2, abs=0.07)


def test_pickle_before_and_after_use(views: BlockViews) -> None:
    image = noise()
    fresh = pickle.loads(pickle.dumps(BlockViews(size=32)))
    expected = views(image, seeded(4))
    used = pickle.loads(pickle.dumps(views))
    assert torch.equal(fresh(image, seeded(4)), expected)
    assert torch.equal(used(image, seeded(4)), expected)
    assert len(pickle.dumps(views)) == len(pickle.dumps(BlockViews(size=32)))


def test_spawned_process_draws_the_same(views: BlockViews) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(first_view, views).result() == first_view(views)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 30), (30, 1), (20, 20000), (20000, 20)])
def test_extreme_images(height: int, width: int, views: BlockViews) -> None:
    assert views(noise(height, width), seeded(0)).shape == (2, 4, 3, 32, 32)


def test_image_is_left_as_it_is_and_may_be_a_read_only_slice(views: BlockViews) -> None:
    image = noise(80, 90)
    copy = image.copy()
    image.flags.writeable = False
    part = image[3:60:2, ::-1]
    assert torch.equal(views(part, seeded(0)), views(np.ascontiguousarray(part), seeded(0)))
    np.testing.assert_array_equal(image, copy)


def test_real_photograph(coco256: Path, views: BlockViews) -> None:
    path = min((coco256 / "val2017").glob("*.jpg"))
    image = np.asarray(Image.open(path).convert("RGB"))
    result = views(image, seeded(0))
    assert result.shape == (2, 4, 3, 32, 32)
    assert torch.equal(views(image, seeded(0)), result)
    assert result.float().flatten(2).std(dim=-1).min() > 1


@pytest.mark.parametrize("size", [15, 0, -224])
def test_small_views_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"size={size}, expected views of at least 16 × 16 pixels: pass size=224"):
        BlockViews(size=size)


@pytest.mark.parametrize("arguments", [{"rows": 0}, {"cols": 0}, {"overlap": -0.1}, {"overlap": 0.6}])
def test_bad_grid_is_refused_at_construction(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}={next(iter(arguments.values()))}"):
        BlockViews(**arguments)


def test_no_branch_is_refused() -> None:
    with pytest.raises(ValueError, match="no recipe, expected one for each branch: leave recipes out"):
        BlockViews(recipes=())


@pytest.mark.parametrize(
    ("image", "given"),
    [
        (np.zeros((8, 8, 3), np.float32), "dtype float32"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), "Tensor"),
        (Image.new("RGB", (8, 8)), "Image"),
        (None, "NoneType"),
    ],
)
def test_other_types_are_refused(image: Any, given: str, views: BlockViews) -> None:
    with pytest.raises(TypeError, match=rf"an image of {given}, expected a uint8 array \(H, W, 3\): pass np.asarray"):
        views(image)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 4), (3, 8, 8), (1, 8, 8, 3), (0, 8, 3), (8, 0, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...], views: BlockViews) -> None:
    with pytest.raises(ValueError, match=r"an image of shape \(.*\), expected \(H, W, 3\) with at least one pixel"):
        views(np.zeros(shape, np.uint8))


def test_import_and_construction_import_neither_albumentations_nor_opencv() -> None:
    code = (
        "import sys; from mlssl.views.blocks import BlockViews; BlockViews(); "
        "assert not {'albumentations', 'cv2'} & sys.modules.keys(), 'imported too early'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
