"""The page: one HTML file with everything in it, which asks the network for nothing."""

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
"""Side in pixels of a picture that the map shows under the pointer."""

SPRITE_COLUMNS = 24


@dataclass(frozen=True)
class Plot:
    """One figure: a name for its ids, what is over it, what it shows in words, and `<svg>`."""

    name: str
    title: str
    caption: str
    svg: str
    table: Mapping[str, Sequence[str]] | None = None
    """Columns of numbers to unfold beneath it."""
    hover: Sequence[tuple[float, float, str]] = ()
    """What is shown where, in the units of the `<svg>`."""


@dataclass(frozen=True)
class Table:
    """Numbers or settings of several runs: a caption, the head of each column, and rows."""

    title: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Neighbor:
    """A picture beside others: `src` is a data address, `labels` its words with those shared with the query marked."""

    src: str
    name: str
    labels: Sequence[tuple[str, bool]] = ()
    cosine: float | None = None


@dataclass(frozen=True)
class FeatureMap:
    """What the maps of one set of images need beside their `<svg>`: a sheet of small pictures, and their labels."""

    maps: Sequence[str]
    """Of the same images in the same order."""
    caption: str
    sprite: str
    columns: int
    side: int
    points: Sequence[Mapping[str, Any]]
    classes: Sequence[str]


@dataclass(frozen=True)
class Page:
    """All that stands on the page, in its order."""

    title: str
    subtitle: str
    verdicts: Sequence[Verdict]
    facts: Mapping[str, str]
    curves: Sequence[Plot]
    quality: Sequence[Plot]
    geometry: Sequence[Plot] = ()
    view_grids: Sequence[tuple[str, str]] = ()
    """Data address and words for who cannot see it."""
    neighbors: Sequence[Sequence[Neighbor]] = ()
    """Rows: the query, then its nearest."""
    feature_map: FeatureMap | None = None
    notes: Sequence[str] = field(default=())
    tables: Sequence[Table] = ()
    version: str = ""


def write_page(page: Page, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mlssl.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = environment.get_template("page.html").render(page=page, zip_columns=_rows)
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files may be any bytes


def data_address(pixels: ImageArray, side: int | None = None, quality: int = 80) -> str:
    """A picture as a `data:` address of a JPEG.

    Args:
        pixels: RGB, uint8 (H, W, 3).
        side: Longest side in pixels that it is shrunk to; None keeps it.
        quality: Of the JPEG, 1–95.
    """
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if side is not None:
        picture.thumbnail((side, side))
    return _encoded(picture, quality)


def sprite(images: Sequence[ImageArray]) -> str:
    """Small square pictures in one sheet, row by row, `SPRITE_COLUMNS` in a row, as a `data:` address."""
    rows = -(-len(images) // SPRITE_COLUMNS)
    sheet = Image.new("RGB", (SPRITE_COLUMNS * THUMBNAIL, rows * THUMBNAIL))
    for place, pixels in enumerate(images):
        top, left = divmod(place, SPRITE_COLUMNS)
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
