"""The regions of an image that become blocks: the overlapping grid, or a user's function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from mlssl.views.branches import CUSTOM, plain_branch, resolve_object
from mlssl.views.grid import Box

Regions: TypeAlias = Callable[[int, int], Sequence[Box | tuple[int, int, int, int]]]
"""A function of height and width that returns the boxes of the K blocks."""

_TRIED_SIZES = ((480, 640), (640, 480), (64, 64))
"""Heights and widths to test a function with: two typical images and a small one."""


class CheckedRegions:
    """Custom regions; their boxes are checked for every image.

    Args:
        regions: The function.

    Raises:
        ValueError: It returns no box, a box outside the image, or a number of boxes that depends on the size.
        TypeError: It returns anything else.
    """

    def __init__(self, regions: Regions) -> None:
        self.regions = regions
        self.number: int | None = None
        for height, width in _TRIED_SIZES:
            self.number = len(self(height, width))

    def __call__(self, height: int, width: int) -> list[Box]:
        """The K boxes of an image."""
        given = self.regions(height, width)
        size = f"an image of {height} × {width}"
        try:
            boxes = [Box(*(int(value) for value in box)) for box in given]
            exact = all(tuple(box) == tuple(one) for box, one in zip(boxes, given, strict=True))
        except (TypeError, ValueError):
            exact = False
        if not exact:
            raise TypeError(
                f"regions returns {given!r} for {size}, expected a list of boxes of four integers: top, left, height "
                "and "
                "width in pixels"
            )
        if not boxes or (self.number is not None and len(boxes) != self.number):
            expected = f"the {self.number} of another size" if self.number else "at least one"
            raise ValueError(
                f"regions returns {len(boxes)} boxes for {size}, expected {expected}: return the same number of boxes "
                "for every size"
            )
        for box in boxes:
            inside = box.top >= 0 and box.left >= 0 and box.top + box.height <= height and box.left + box.width <= width
            if not inside or box.height < 1 or box.width < 1:
                raise ValueError(
                    f"regions returns {box} for {size}, which is not inside it: return boxes of at least one pixel "
                    "within height and width"
                )
        return boxes


def resolve_regions(setting: Any) -> CheckedRegions:
    """Resolve a function, its import path or {class_path, init_args} to regions.

    Raises:
        ValueError: It cannot be imported, or its boxes are wrong.
        TypeError: It is not a function.
    """
    regions = resolve_object(setting, "regions") if isinstance(setting, (str, Mapping)) else setting
    if not callable(regions) or isinstance(regions, type):
        raise TypeError(
            f"regions is of type {type(regions).__name__}: pass a function (height, width) -> list of boxes, or "
            "leave it out for the grid of rows, cols and overlap"
        )
    return CheckedRegions(regions)


def plain_regions(setting: Any) -> str | None:
    """Text that represents custom regions in hyper-parameters, never imported; None for the grid."""
    if setting is None:
        return None
    return setting if isinstance(setting, str) and setting.startswith(CUSTOM) else str(plain_branch(setting))
