"""The geometry of blocks against its definition, at the limits of its ranges."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from math import floor, nan

import pytest

from mlssl.views.grid import Box, block_grid

SIDES = (1, 2, 3, 7, 64, 375, 640)
COUNTS = (1, 2, 3, 5)
OVERLAPS = (0.0, 0.125, 0.2, 0.3, 0.5)


def slow_interval(side: int, count: int, overlap: float, i: int) -> tuple[int, int]:
    """docs/method.md word for word, in exact fractions."""
    exact = (Fraction(1, count) + Fraction(str(overlap))) * side
    length = max(1, min(side, floor(exact + Fraction(1, 2))))
    return (0, length) if count == 1 else (floor(Fraction(i * (side - length), count - 1)), length)


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("rows", COUNTS)
@pytest.mark.parametrize("cols", COUNTS)
def test_equals_slow_statement(rows: int, cols: int, overlap: float) -> None:
    for height, width in product(SIDES, SIDES):
        expected = []
        for row in range(rows):
            for col in range(cols):
                top, block_height = slow_interval(height, rows, overlap, row)
                left, block_width = slow_interval(width, cols, overlap, col)
                expected.append(Box(top, left, block_height, block_width))
        assert block_grid(height, width, rows, cols, overlap) == expected


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 2), (2, 2), (3, 3), (4, 2), (7, 5)])
def test_first_starts_at_zero_last_ends_at_edge_all_inside(rows: int, cols: int, overlap: float) -> None:
    for height, width in product(SIDES, SIDES):
        boxes = block_grid(height, width, rows, cols, overlap)
        assert len(boxes) == rows * cols
        assert boxes[0][:2] == (0, 0)
        if rows > 1:
            assert boxes[-1].top + boxes[-1].height == height
        if cols > 1:
            assert boxes[-1].left + boxes[-1].width == width
        for box in boxes:
            assert box.top >= 0
            assert box.left >= 0
            assert box.height >= 1
            assert box.width >= 1
            assert box.top + box.height <= height
            assert box.left + box.width <= width
        assert len({(box.height, box.width) for box in boxes}) == 1
        assert all(type(number) is int for box in boxes for number in box)


def test_two_by_two_is_row_major_and_seventy_percent() -> None:
    boxes = block_grid(100, 200)
    assert boxes == [Box(0, 0, 70, 140), Box(0, 60, 70, 140), Box(30, 0, 70, 140), Box(30, 60, 70, 140)]


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_one_block_is_the_whole_image(overlap: float) -> None:
    assert block_grid(33, 47, rows=1, cols=1, overlap=overlap) == [Box(0, 0, 33, 47)]


def test_largest_overlap_of_two_by_two_is_the_whole_image_four_times() -> None:
    assert block_grid(33, 47, overlap=0.5) == [Box(0, 0, 33, 47)] * 4


def test_no_overlap_tiles_a_divisible_image() -> None:
    covered = [0] * (12 * 20)
    for box in block_grid(12, 20, rows=3, cols=4, overlap=0.0):
        for y, x in product(range(box.top, box.top + box.height), range(box.left, box.left + box.width)):
            covered[20 * y + x] += 1
    assert covered == [1] * len(covered)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2, 2), (50, 50)])
def test_one_pixel_image_gives_that_pixel(rows: int, cols: int) -> None:
    assert block_grid(1, 1, rows, cols, overlap=0.0) == [Box(0, 0, 1, 1)] * (rows * cols)


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0), (-1, 5)])
def test_empty_image_is_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"height {height} and width {width}, expected at least one pixel"):
        block_grid(height, width)


@pytest.mark.parametrize(("rows", "cols"), [(0, 2), (2, 0), (-3, 2)])
def test_empty_grid_is_refused(rows: int, cols: int) -> None:
    with pytest.raises(ValueError, match=f"rows={rows} and cols={cols}, expected at least 1.* pass rows=2, cols=2"):
        block_grid(10, 10, rows, cols)


@pytest.mark.parametrize("overlap", [-0.01, 0.51, 20.0, nan])
def test_overlap_out_of_range_is_refused(overlap: float) -> None:
    with pytest.raises(ValueError, match=r"overlap=.*, expected a fraction .* between 0 and 0\.5: pass overlap=0\.2"):
        block_grid(10, 10, overlap=overlap)
