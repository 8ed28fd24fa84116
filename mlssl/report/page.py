"""The page: one self-contained HTML file without network requests."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlssl.atomic import written_aside
from mlssl.data.decoding import ImageArray
from mlssl.report.verdicts import Verdict

THUMBNAIL = 56
"""Side in pixels of the map's thumbnails."""

SPRITE_COLUMNS = 24


@dataclass(frozen=True)
class Plot:
    """One plot: a name for its HTML ids, title, caption, and `<svg>`."""

    name: str
    title: str
    caption: str
    svg: str
    table: Mapping[str, Sequence[str]] | None = None
    """Columns of an expandable table below the plot."""
    hover: Sequence[tuple[float, float, str]] = ()
    """Tooltips: x and y in the units of the `<svg>`, and text."""


@dataclass(frozen=True)
class Table:
    """A table of several runs: title, caption, column headers and rows."""

    title: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Neighbor:
    """An image in a row of neighbours: `src` is a data URL, `labels` its labels, each with whether the query has it."""

    src: str
    name: str
    labels: Sequence[tuple[str, bool]] = ()
    cosine: float | None = None


@dataclass(frozen=True)
class FeatureMap:
    """Maps of one set of images, with a sprite sheet of thumbnails and labels."""

    maps: Sequence[str]
    """`<svg>` of each map, of the same images in the same order."""
    caption: str
    sprite: str
    columns: int
    side: int
    points: Sequence[Mapping[str, Any]]
    classes: Sequence[str]


@dataclass(frozen=True)
class Page:
    """The contents of the page, in order."""

    title: str
    subtitle: str
    verdicts: Sequence[Verdict]
    facts: Mapping[str, str]
    curves: Sequence[Plot]
    quality: Sequence[Plot]
    geometry: Sequence[Plot] = ()
    view_grids: Sequence[tuple[str, str]] = ()
    """Data URL and alt text."""
    neighbors: Sequence[Sequence[Neighbor]] = ()
    """Rows: the query, then its nearest neighbours."""
    feature_map: FeatureMap | None = None
    notes: Sequence[str] = field(default=())
    tables: Sequence[Table] = ()
    version: str = ""


def write_page(page: Page, path: Path) -> None:
    """Write the page atomically.

    Raises:
        OSError: The page cannot be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mlssl.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = environment.get_template("page.html").render(page=page, zip_columns=_rows)
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")  # file names may contain any bytes


def data_address(pixels: ImageArray, side: int | None = None, quality: int = 80) -> str:
    """An image as a JPEG `data:` URL.

    Args:
        pixels: RGB, uint8 (H, W, 3).
        side: Maximum side in pixels; larger images are shrunk. None keeps the size.
        quality: JPEG quality, 1–95.
    """
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if side is not None:
        picture.thumbnail((side, side))
    return _encoded(picture, quality)


def sprite(images: Sequence[ImageArray]) -> str:
    """A sprite sheet of square thumbnails, `SPRITE_COLUMNS` per row, as a `data:` URL."""
    rows = -(-len(images) // SPRITE_COLUMNS)
    sheet = Image.new("RGB", (SPRITE_COLUMNS * THUMBNAIL, rows * THUMBNAIL))
    for index, pixels in enumerate(images):
        top, left = divmod(index, SPRITE_COLUMNS)
        sheet.paste(_square(pixels, THUMBNAIL), (left * THUMBNAIL, top * THUMBNAIL))
    return _encoded(sheet, 70)


def _rows(table: Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
    return list(zip(*table.values(), strict=True))


def _square(pixels: ImageArray, side: int) -> Image.Image:
    height, width = pixels.shape[:2]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    return Image.fromarray(np.ascontiguousarray(pixels[top : top + edge, left : left + edge])).resize((side, side))


def _encoded(picture: Image.Image, quality: int) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
