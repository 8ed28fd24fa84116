"""Views of whole images: shapes, random samples, pickling and refused arguments."""

from __future__ import annotations

import multiprocessing
import pickle
import random
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mlssl.views.blocks import BlockViews
from mlssl.views.draws import NUM_UNIFORMS, draw_operations
from mlssl.views.grid import block_grid
from mlssl.views.pixels import Renderer
from mlssl.views.recipe import PRESETS, Recipe
from mlssl.views.streams import LOCAL_VIEWS, Streams

PLAIN = Recipe(
    blur_probability=0.0,
    solarize_probability=0.0,
    crop_area=(1.0, 1.0),
    crop_aspect=(1.0, 1.0),
    jitter_probability=0.0,
    gray_probability=0.0,
    flip_probability=0.0,
)


def noise(height: int = 50, width: int = 70, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def seeded(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def first_view(views: BlockViews) -> bytes:
    """Run in another process by `test_a_spawned_process_samples_the_same`."""
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
    plain = PLAIN
    image = np.zeros((60, 60, 3), np.uint8)
    grid = BlockViews(size=20, rows=3, cols=3, overlap=0.0, branches=[plain])
    for k, box in enumerate(grid.boxes(60, 60)):
        image[box.top : box.top + box.height, box.left : box.left + box.width] = (10 * k, 100, 200)
    result = grid(image)
    for k in range(9):
        assert result[0, k].flatten(1).unique(dim=1).flatten().tolist() == [10 * k, 100, 200]


def test_equals_sampling_and_rendering_one_after_another(views: BlockViews) -> None:
    image = noise()
    root = int(seeded(3).integers(2**64, dtype=np.uint64))
    slow = np.empty((2, 4, 3, 32, 32), np.uint8)
    for branch, recipe in enumerate(PRESETS["paper"]):
        for k, (top, left, height, width) in enumerate(block_grid(*image.shape[:2])):
            block = image[top : top + height, left : left + width].copy()
            uniforms = Streams().uniforms(root, branch, 4, NUM_UNIFORMS)[k]
            operations = draw_operations(recipe, height, width, 32, uniforms)
            Renderer(32)(block, operations, slow[branch, k])
    torch.testing.assert_close(views(image, seeded(3)), torch.from_numpy(slow), rtol=0, atol=0)


def test_samples_depend_only_on_the_generator(views: BlockViews) -> None:
    image = noise()
    first = views(image, seeded(1))
    views(noise(40, 40, 9), seeded(2))
    random.seed(7)
    torch.manual_seed(7)
    np.random.default_rng(7)
    assert torch.equal(views(image, seeded(1)), first)
    assert torch.equal(BlockViews(size=32)(image, seeded(1)), first)
    assert not torch.equal(views(image, seeded(2)), first)


def test_global_random_states_do_not_change(views: BlockViews) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    views(noise())
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert after == before


def test_without_a_generator_calls_differ(views: BlockViews) -> None:
    image = noise()
    assert not torch.equal(views(image), views(image))


def test_blocks_and_branches_sample_independently() -> None:
    whole = BlockViews(size=32, overlap=0.5)
    result = whole(noise(), seeded(0)).flatten(0, 1)
    assert len({view.numpy().tobytes() for view in result}) == 8


def test_branches_differ_in_how_often_they_solarize() -> None:
    dark = np.full((32, 32, 3), 255, np.uint8)
    quiet: dict[str, Any] = {"jitter_probability": 0.0, "gray_probability": 0.0}
    grid = BlockViews(size=16, branches=[replace(recipe, **quiet) for recipe in PRESETS["paper"]])
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


@pytest.mark.slow
def test_a_spawned_process_samples_the_same(views: BlockViews) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(first_view, views).result() == first_view(views)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 30), (30, 1), (20, 20000), (20000, 20)])
def test_extreme_images(height: int, width: int, views: BlockViews) -> None:
    assert views(noise(height, width), seeded(0)).shape == (2, 4, 3, 32, 32)


def test_image_is_not_changed_and_may_be_a_read_only_slice(views: BlockViews) -> None:
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
        "import sys; from mlssl.views.blocks import BlockViews; BlockViews(local_views={'count': 2}).with_size(32); "
        "assert not {'albumentations', 'cv2'} & sys.modules.keys(), 'imported too early'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_rendering_imports_no_torch_and_gives_the_same_views_within_1_of_255(views: BlockViews, tmp_path: Path) -> None:
    """An empty package named mlssl replaces one that imports submodules itself."""
    code = f"""
import sys, types
package = types.ModuleType("mlssl")
package.__path__ = [{str(Path(sys.modules["mlssl"].__file__ or "").parent)!r}]
sys.modules["mlssl"] = package
import numpy as np
from mlssl.data.decoding import decode_rgb
from mlssl.drawing.views import draw_view_grid
from mlssl.views.blocks import BlockViews
views = BlockViews(size=32, local_views={{"count": 3, "size": 16}})
image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
made = views.arrays(image, np.random.default_rng(1))
draw_view_grid(image, made["views"], views.boxes(50, 70), local_views=made["local_views"])
np.savez(sys.argv[1], **made)
assert not {{"torch", "lightning", "timm", "albumentations"}} & sys.modules.keys(), "imported too early"
"""
    path = tmp_path / "views.npz"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    here = BlockViews(size=32, local_views={"count": 3, "size": 16}).arrays(image, seeded(1))
    there = np.load(path)
    for name in ("boxes", "local_boxes"):
        np.testing.assert_array_equal(there[name], here[name])
    differences = np.abs(there["views"].astype(int) - here["views"])
    assert differences.mean() < 1  # where solarize inverts at a threshold, single pixels may differ by much
    np.testing.assert_array_equal(here["views"], views(image, seeded(1)))


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_give_two_branches(preset: str) -> None:
    grid = BlockViews(16, branches=preset)
    assert grid.num_branches == 2
    assert grid(noise(), seeded(0)).shape == (2, 4, 3, 16, 16)


def test_boxes_match_the_content_of_a_view() -> None:
    """Of an image whose red and green are the row and column, the corners of a view are the corners of its box."""
    rows, cols = np.mgrid[0:200, 0:240]
    image = np.stack([rows, cols, 0 * rows], axis=2).astype(np.uint8)
    grid = BlockViews(
        64, rows=2, cols=3, branches=[replace(PLAIN, crop_area=(0.2, 1.0), crop_aspect=(3 / 4, 4 / 3))] * 3
    )
    made = grid.with_boxes(image, seeded(0))
    assert made["boxes"].dtype == torch.float32
    assert made["boxes"].shape == (3, 6, 4)
    assert torch.equal(made["views"], grid(image, seeded(0)))
    top, left, height, width = (made["boxes"].double() * torch.tensor([200, 240, 200, 240])).unbind(-1)
    values = made["views"].double()
    for corner, expected in (
        (values[:, :, 0, 0, 0], top),
        (values[:, :, 1, 0, 0], left),
        (values[:, :, 0, -1, -1], top + height - 1),
        (values[:, :, 1, -1, -1], left + width - 1),
    ):
        torch.testing.assert_close(corner, expected, atol=2, rtol=0)


def test_flips_and_rotations_do_not_change_boxes() -> None:
    moved = replace(PLAIN, flip_probability=1, vertical_flip_probability=1, turn_probability=1)
    both = [BlockViews(16, branches=[recipe]).arrays(noise(), seeded(0)) for recipe in (PLAIN, moved)]
    np.testing.assert_array_equal(both[0]["boxes"], both[1]["boxes"])
    assert not np.array_equal(both[0]["views"], both[1]["views"])


def test_an_additional_branch_does_not_change_the_views_of_others() -> None:
    two, three = (BlockViews(16, branches=[Recipe()] * number)(noise(), seeded(0)) for number in (2, 3))
    assert torch.equal(three[:2], two)
    more = BlockViews(16, rows=2, cols=2, local_views={"count": 3, "size": 8}).arrays(noise(), seeded(0))
    assert np.array_equal(more["views"], BlockViews(16).arrays(noise(), seeded(0))["views"])


class Greedy:
    """Takes numbers, keeps the generator, spawns from it, and scribbles on the block."""

    def __init__(self, numbers: int) -> None:
        self.numbers = numbers
        self.kept: Any = None

    def __call__(self, block: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        if self.kept is not None:
            self.kept.random(self.numbers)
        self.kept = generator
        generator.random(self.numbers)
        block[:] = 0
        return generator.spawn(1)[0].integers(0, 256, (3, 16, 16), np.uint8)


def test_a_branch_cannot_affect_the_others() -> None:
    """Also where it takes as many numbers as it likes from this generator and from the one of the view before."""
    one, other = (BlockViews(16, branches=[Recipe(), Greedy(number), Recipe()]) for number in (0, 50))
    image = noise()
    before = image.copy()
    first, second = one(image, seeded(0)), other(image, seeded(0))
    assert torch.equal(first, second)
    assert torch.equal(first, one(image, seeded(0)))
    assert torch.equal(first[0], BlockViews(16)(image, seeded(0))[0])
    np.testing.assert_array_equal(image, before)


def test_one_number_is_taken_from_the_generator() -> None:
    given, other = seeded(0), seeded(0)
    BlockViews(16, branches=[Recipe()] * 3, local_views={"count": 5, "size": 8}).arrays(noise(), given)
    other.integers(2**64, dtype=np.uint64)
    assert given.random() == other.random()


def gray_ramp(block: np.ndarray, generator: np.random.Generator) -> tuple[torch.Tensor, tuple[float, ...]]:
    """A function as a branch: a random value everywhere, of the upper left quarter of the block."""
    return torch.full((3, 16, 16), int(generator.integers(256)), dtype=torch.uint8), (0.0, 0.0, 0.5, 0.5)


def test_a_function_is_a_branch_and_its_box_is_part_of_its_block() -> None:
    grid = BlockViews(16, overlap=0.0, branches=[gray_ramp, Recipe()])
    made = grid.with_boxes(noise(40, 80), seeded(0))
    assert made["boxes"][0].tolist() == [[y, x, 0.25, 0.25] for y in (0, 0.5) for x in (0, 0.5)]
    values = made["views"][0].flatten(1)
    assert (values == values[:, :1]).all()
    assert len(values[:, 0].unique()) > 1
    assert torch.equal(pickle.loads(pickle.dumps(grid))(noise(40, 80), seeded(0)), made["views"])


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (None, TypeError, r"returns nothing, expected uint8 \(3, 16, 16\): return the view's pixels"),
        ("pixels", TypeError, "returns an object of type str, expected uint8"),
        (np.zeros((16, 16, 3), np.uint8), ValueError, r"returns pixels of shape \(16, 16, 3\), expected \(3, 16, 16\)"),
        (np.zeros((3, 20, 20), np.uint8), ValueError, r"returns pixels of shape \(3, 20, 20\).*end it with a resize"),
        (torch.zeros(1, 16, 16, dtype=torch.uint8), ValueError, r"returns pixels of shape \(1, 16, 16\)"),
        (np.zeros((3, 16, 16), np.float32), TypeError, "returns float32, expected uint8 .*do not normalise"),
        (torch.zeros(3, 16, 16), TypeError, r"returns torch.float32, expected uint8"),
        ((np.zeros((3, 16, 16), np.uint8), (0, 0, 9, 9)), ValueError, r"returns the box \(0.0, 0.0, 9.0, 9.0\).*0–1"),
        ((np.zeros((3, 16, 16), np.uint8), (0, 0, 0, 1)), ValueError, "returns the box .* inside 0–1"),
        ((np.zeros((3, 16, 16), np.uint8), (0, 0, float("nan"), 1)), ValueError, "returns the box"),
        ((np.zeros((3, 16, 16), np.uint8), "box"), TypeError, "of type tuple|of type str as the box.*four numbers"),
    ],
)
def test_a_branch_with_wrong_output_is_named(given: Any, error: type[Exception], said: str) -> None:
    class Wrong:
        def __init__(self, good: int) -> None:
            self.good = good

        def __call__(self, block: np.ndarray, generator: np.random.Generator) -> Any:
            self.good -= 1
            return np.zeros((3, 16, 16), np.uint8) if self.good >= 0 else given

    for good in (0, 3):  # at construction, and at a later view
        with pytest.raises(error, match=rf"branch 1 \(.*Wrong\) {said}"):
            BlockViews(16, branches=[Recipe(), Wrong(good)])(noise())


def test_a_branch_that_fails_is_named_at_construction() -> None:
    def one_argument(block: np.ndarray) -> None: ...

    with pytest.raises(
        ValueError, match=r"branch 0 \(.*one_argument\) fails on a blank block.*TypeError.*2 were given"
    ):
        BlockViews(16, branches=[one_argument])


def whole_and_halves(height: int, width: int) -> list[tuple[int, int, int, int]]:
    return [(0, 0, height, width), (0, 0, height, width // 2), (0, width // 2, height, width - width // 2)]


def test_regions_replace_the_grid() -> None:
    grid = BlockViews(16, branches=[PLAIN, gray_ramp], regions=whole_and_halves)
    assert grid.num_blocks == 3
    assert grid.boxes(40, 60)[2] == (0, 30, 40, 30)
    image = np.zeros((32, 64, 3), np.uint8)
    image[:, 32:] = 200
    made = grid.arrays(image, seeded(0))
    assert made["views"].shape == (2, 3, 3, 16, 16)
    assert made["views"][0, 1].max() == 0
    assert made["views"][0, 2].min() == 200
    assert made["boxes"][0].tolist()[1:] == [[0, 0, 1, 0.5], [0, 0.5, 1, 0.5]]
    assert BlockViews(16, regions="test_blocks.whole_and_halves").boxes(40, 60) == grid.boxes(40, 60)


@pytest.mark.parametrize(
    ("regions", "error", "said"),
    [
        (
            lambda height, width: [],
            ValueError,
            "regions returns 0 boxes for an image of 480 × 640, expected at least one",
        ),
        (
            lambda height, width: [(0, 0, 10, 10)] * (height // 64),
            ValueError,
            "regions returns 10 boxes .*the 7 of another",
        ),
        (
            lambda height, width: [(0, 0, 100, 100)],
            ValueError,
            r"regions returns Box\(.*\) for an image of 64 × 64, which",
        ),
        (lambda height, width: [(-1, 0, 10, 10)], ValueError, "is not inside it: return boxes of at least one pixel"),
        (lambda height, width: [(0, 0, 0, 10)], ValueError, "is not inside it"),
        (lambda height, width: [(0, 0, 10.5, 10)], TypeError, "expected a list of boxes of four integers"),
        (lambda height, width: None, TypeError, "regions returns None .*expected a list of boxes"),
        (lambda height, width: [(0, 0, 10)], TypeError, "expected a list of boxes of four integers"),
        (3, TypeError, "regions is of type int: pass a function"),
        (list, TypeError, "regions is of type type: pass a function"),
        ("nowhere.regions", ValueError, "regions is 'nowhere.regions', which cannot be imported"),
        ("custom mine.regions", ValueError, "regions is 'custom mine.regions', .* pass the function or object again"),
    ],
)
def test_wrong_regions_are_refused(regions: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        BlockViews(16, regions=regions)


def test_regions_and_a_grid_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"got regions together with a grid of rows=3, cols=2 and overlap=0\.2: leave out"
    ):
        BlockViews(16, rows=3, regions=whole_and_halves)


def whole_block(block: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A branch of 8 pixels: the corners' mean of row and column."""
    return np.broadcast_to(block[0, 0][:, None, None], (3, 8, 8))


@pytest.mark.parametrize("branch", [None, Recipe(flip_probability=1), {"hue": 0.0}, whole_block])
def test_local_views_show_parts_of_the_whole_image_of_the_given_area(branch: Any) -> None:
    settings = {"count": 40, "size": 8, "area": (0.1, 0.2)}
    grid = BlockViews(16, local_views=settings if branch is None else {**settings, "branch": branch})
    made = grid.with_boxes(noise(100, 120), seeded(0))
    assert made["local_views"].shape == (40, 3, 8, 8)
    assert made["local_views"].dtype == torch.uint8
    assert made["local_boxes"].dtype == torch.float32
    top, left, height, width = made["local_boxes"].unbind(1)
    areas = height * width
    assert 0.09 < areas.min() < 0.12
    assert 0.18 < areas.max() < 0.21
    assert (top + height).max() <= 1.0001
    assert (left + width).max() <= 1.0001
    assert len({view.numpy().tobytes() for view in made["local_views"]}) > 35
    again = grid.with_boxes(noise(100, 120), seeded(0))
    assert all(torch.equal(again[name], made[name]) for name in made)


def test_a_local_branch_gets_the_crop_that_its_box_names() -> None:
    rows, cols = np.mgrid[0:200, 0:240]
    image = np.stack([rows, cols, 0 * rows], axis=2).astype(np.uint8)
    made = BlockViews(16, local_views={"count": 9, "size": 8, "branch": whole_block}).arrays(image, seeded(0))
    corners = made["local_boxes"][:, :2] * (200, 240)
    np.testing.assert_allclose(made["local_views"][:, :2, 0, 0], corners, atol=0.01)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        (4, TypeError, "local_views is of type int: pass a mapping"),
        ({"size": 32}, ValueError, "local_views has no count: pass the number of views"),
        ({"count": 2, "sise": 32}, ValueError, "local_views has no 'sise', did you mean 'size'?"),
        ({"count": 0}, ValueError, "local_views has count=0, expected an integer of at least 1"),
        ({"count": 2, "size": 7}, ValueError, "local_views has size=7, expected an integer of at least 8"),
        ({"count": 2, "size": 32.0}, ValueError, "local_views has size=32.0, expected an integer"),
        ({"count": 2, "area": (0.5, 0.2)}, ValueError, r"local_views has a wrong area: got area=\(0.5, 0.2\)"),
        (
            {"count": 2, "branch": {"hu": 0}},
            ValueError,
            "the Recipe of the branch of local_views has no 'hu', did you mean",
        ),
        ({"count": 2, "branch": 3}, TypeError, "the branch of local_views is of type builtins.int"),
        (
            {"count": 2, "size": 16, "branch": whole_block},
            ValueError,
            r"the branch of local_views .the first branch by default. returns .*\(3, 8, 8\)",
        ),
    ],
)
def test_wrong_local_views_are_refused(settings: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        BlockViews(16, local_views=settings)


def test_local_views_have_streams_separate_from_all_branches() -> None:
    firsts = {Streams.generator(7, branch, block).random() for branch in (0, 1, 2, LOCAL_VIEWS) for block in range(50)}
    assert len(firsts) == 200


def test_another_size_shows_the_same_crops_and_does_not_change_local_views() -> None:
    grid = BlockViews(32, local_views={"count": 2, "size": 8})
    other = grid.with_size(48)
    one, two = grid.arrays(noise(), seeded(0)), other.arrays(noise(), seeded(0))
    assert two["views"].shape == (2, 4, 3, 48, 48)
    for name in ("boxes", "local_views", "local_boxes"):
        np.testing.assert_array_equal(one[name], two[name])
    assert np.array_equal(BlockViews(48).arrays(noise(), seeded(0))["views"], two["views"])
    assert grid.size == 32
    with pytest.raises(ValueError, match="size=15, expected views of at least 16"):
        grid.with_size(15)
    with pytest.raises(ValueError, match=r"branch 1 \(test_blocks.gray_ramp\) is not a Recipe .*16 pixels, but 32"):
        BlockViews(16, branches=[Recipe(), gray_ramp]).with_size(32)


def test_views_of_a_photograph_by_every_preset_stay_photographs(coco256: Path) -> None:
    path = min((coco256 / "val2017").glob("*.jpg"))
    image = np.asarray(Image.open(path).convert("RGB"))
    for preset in PRESETS:
        made = BlockViews(32, branches=preset, local_views={"count": 4, "size": 16}).arrays(image, seeded(0))
        assert made["views"].std(axis=(2, 3, 4)).min() > 1
        assert made["local_views"].std(axis=(1, 2, 3)).min() > 1
