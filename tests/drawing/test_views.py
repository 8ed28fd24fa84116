"""The figure of an image with its blocks and views."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mlssl.data.decoding import decode_rgb
from mlssl.drawing.views import COLOURS, draw_view_grid, enlargements
from mlssl.views.blocks import BlockViews
from mlssl.views.grid import Box, block_grid

GRAY = np.full((60, 90, 3), 128, np.uint8)


def plain_views(branches: int = 2, blocks: int = 4, size: int = 16) -> torch.Tensor:
    """Views of one colour each, (100 + branch, 200 + block, 7)."""
    views = torch.full((branches, blocks, 3, size, size), 7, dtype=torch.uint8)
    views[:, :, 0] = (100 + torch.arange(branches))[:, None, None, None]
    views[:, :, 1] = (200 + torch.arange(blocks))[:, None, None]
    return views


def centres(picture: np.ndarray, branches: int, blocks: int) -> np.ndarray:
    """Centre (row, column) in the picture of each view of `plain_views`: (branches, blocks, 2)."""
    places = [
        [np.argwhere((picture == (100 + branch, 200 + block, 7)).all(2)).mean(0) for block in range(blocks)]
        for branch in range(branches)
    ]
    return np.array(places)


@pytest.mark.parametrize(("branches", "rows", "cols"), [(2, 2, 2), (2, 3, 3), (1, 1, 1), (3, 1, 2), (2, 4, 5)])
def test_every_view_is_in_the_row_of_its_branch_and_the_column_of_its_block(
    branches: int, rows: int, cols: int
) -> None:
    blocks = rows * cols
    picture = draw_view_grid(GRAY, plain_views(branches, blocks), block_grid(60, 90, rows, cols, 0.2))
    places = centres(picture, branches, blocks)
    np.testing.assert_array_equal(places[..., 0], np.broadcast_to(places[:, :1, 0], places.shape[:2]))
    np.testing.assert_array_equal(places[..., 1], np.broadcast_to(places[:1, :, 1], places.shape[:2]))
    assert (np.diff(places[:, 0, 0]) > 0).all()
    assert (np.diff(places[0, :, 1]) > 0).all()


def test_a_view_is_framed_in_the_colour_of_its_block() -> None:
    picture = draw_view_grid(GRAY, plain_views(), block_grid(60, 90))
    for branch, blocks in enumerate(centres(picture, 2, 4)):
        for block, (row, column) in enumerate(blocks.round().astype(int)):
            column_of_pixels = picture[:row, column]
            inside = (column_of_pixels == (100 + branch, 200 + block, 7)).all(1)
            frame = column_of_pixels[np.flatnonzero(~inside)[-1]]
            assert tuple(frame) == rgb(block)


@pytest.mark.parametrize("shape", [(60, 90), (333, 50), (20, 400), (1000, 700)])
def test_the_rectangle_of_each_block_surrounds_it_and_is_fully_visible(shape: tuple[int, int]) -> None:
    boxes = block_grid(*shape)
    picture = draw_view_grid(np.full((*shape, 3), 128, np.uint8), plain_views(), boxes)
    left_of_views = int(centres(picture, 2, 4)[0, 0, 1]) - 160
    overview = picture[:, :left_of_views]
    rows, cols = np.nonzero((overview == 128).all(2))
    top, left, scale = rows.min(), cols.min(), (rows.max() + 1 - rows.min()) / shape[0]
    for block, box in enumerate(boxes):
        ys, xs = np.nonzero((overview == rgb(block)).all(2))
        edges = np.array([ys.min() - top, xs.min() - left, ys.max() + 1 - top, xs.max() + 1 - left])
        wanted = scale * np.array([box.top, box.left, box.top + box.height, box.left + box.width])
        assert edges == pytest.approx(wanted, abs=14)


def test_local_views_are_drawn_below_in_rows_and_at_their_scale() -> None:
    local = torch.full((6, 3, 8, 8), 50, dtype=torch.uint8)
    local[:, 0] = torch.arange(100, 106)[:, None, None]
    boxes = block_grid(60, 90)
    picture = draw_view_grid(GRAY, plain_views().numpy(), boxes, local_views=local)
    corners = [np.argwhere((picture == (100 + one, 50, 50)).all(2)) for one in range(6)]
    assert all(len(pixels) == 80 * 80 for pixels in corners)  # half of 160, as 8 of 16
    tops, lefts = np.array([pixels.min(0) for pixels in corners]).T
    assert tops[0] == tops[1] == tops[3] < tops[4] == tops[5]
    assert lefts[0] < lefts[1] < lefts[2] < lefts[3]
    assert lefts[4:].tolist() == lefts[:2].tolist()
    assert tops[0] > centres(picture, 2, 4)[1, 0, 0]
    with pytest.raises(ValueError, match=r"local views are uint8 of shape \(6, 2, 8, 8\): pass those of one image"):
        draw_view_grid(GRAY, plain_views(), boxes, local_views=local[:, :2])


def test_boxes_may_be_plain_tuples_anywhere_in_the_image() -> None:
    picture = draw_view_grid(GRAY, plain_views(1, 2), [(0, 0, 60, 90), (20, 30, 20, 20)])
    assert all((picture == rgb(block)).all(2).any() for block in range(2))


def test_an_image_of_one_pixel_is_drawn() -> None:
    picture = draw_view_grid(GRAY[:1, :1], plain_views(), block_grid(1, 1))
    assert (picture == 128).all(2).any()


def test_a_title_is_drawn_above() -> None:
    without = draw_view_grid(GRAY, plain_views(), block_grid(60, 90))
    titled = draw_view_grid(GRAY, plain_views(), block_grid(60, 90), title="000000000025.jpg")
    assert titled.shape[0] > without.shape[0]
    assert titled.shape[1] == without.shape[1]
    assert (titled[: titled.shape[0] - without.shape[0]] < 255).any()


def test_an_enlarged_view_is_tagged() -> None:
    shown = np.array([[[0, 0, 1, 1], [0, 0, 0.25, 0.25]]])
    enlarged = enlargements(shown, 64, 64, 32)
    assert enlarged.tolist() == [[0.5, 2.0]]
    views, boxes = plain_views(1, 2), block_grid(60, 90, 1, 2)
    without, tagged = (draw_view_grid(GRAY, views, boxes, enlarged=one) for one in (None, enlarged))
    changed = np.argwhere((without != tagged).any(2))
    (_, (top, left)) = centres(without, 1, 2)[0]
    assert (changed.min(0) > [top, left - 80]).all(), "in the lower half of the second view alone"
    assert (changed.max(0) <= [top + 80, left + 80]).all()


def test_the_file_contains_the_returned_figure(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "grid.png"
    picture = draw_view_grid(GRAY, plain_views(), block_grid(60, 90), path)
    np.testing.assert_array_equal(decode_rgb(path), picture)
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]


def test_the_suffix_chooses_the_format(tmp_path: Path) -> None:
    draw_view_grid(GRAY, plain_views(), block_grid(60, 90), tmp_path / "grid.jpg")
    with Image.open(tmp_path / "grid.jpg") as file:
        assert file.format == "JPEG"


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "grid.nonsense"
    path.write_text("old")
    with pytest.raises(ValueError, match="unknown file extension"):
        draw_view_grid(GRAY, plain_views(), block_grid(60, 90), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_image_is_not_changed() -> None:
    image = GRAY.copy()
    image.flags.writeable = False
    draw_view_grid(image, plain_views(), block_grid(60, 90))


def test_a_photograph_with_its_real_views(coco256: Path) -> None:
    photograph = decode_rgb(sorted((coco256 / "train2017").glob("*.jpg"))[1])
    views = BlockViews(64, rows=2, cols=3)
    boxes = views.boxes(*photograph.shape[:2])
    picture = draw_view_grid(photograph, views(photograph, np.random.default_rng(0)), boxes)
    assert picture.dtype == np.uint8
    assert all((picture == rgb(block)).all(2).any() for block in range(6))


@pytest.mark.parametrize(
    ("image", "views", "boxes", "message"),
    [
        (GRAY / 255, plain_views(), 4, r"image is float64 of shape \(60, 90, 3\): pass its pixels"),
        (GRAY[:, :, 0], plain_views(), 4, r"image is uint8 of shape \(60, 90\)"),
        (GRAY[:0], plain_views(), 4, r"image is uint8 of shape \(0, 90, 3\)"),
        (GRAY, plain_views()[None], 4, r"views are uint8 of shape \(1, 2, 4, 3, 16, 16\): pass those of one"),
        (GRAY, plain_views().float(), 4, r"views are float32"),
        (GRAY, plain_views(), 3, "3 boxes and views of 4 blocks: give BlockViews.boxes"),
    ],
)
def test_what_does_not_fit_is_refused(image: np.ndarray, views: torch.Tensor, boxes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_view_grid(image, views, [Box(0, 0, 60, 90)] * boxes)


def rgb(block: int) -> tuple[int, ...]:
    return tuple(bytes.fromhex(COLOURS[block % len(COLOURS)][1:]))
