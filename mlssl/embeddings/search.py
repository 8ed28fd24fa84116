"""Exact search in saved embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mlssl.backbones import check_image_size
from mlssl.choices import Pooling
from mlssl.contracts import FeatureNetwork
from mlssl.data.decoding import ImageArray, decode_rgb
from mlssl.embeddings.files import Embeddings
from mlssl.embeddings.networks import FeatureRows
from mlssl.feature_maps import same_features

PIECE = 2**14
"""Rows compared at a time, so that memory-mapped embeddings are never copied as a whole."""


class Nearest(NamedTuple):
    """Indices of the embeddings, nearest first, and their cosines."""

    indices: list[int]
    cosines: list[float]


def nearest_rows(query: Tensor, rows: Tensor, k: int, leave_out: int | None = None) -> Nearest:
    """The k rows with the largest cosine to a query, exactly; all rows if there are fewer.

    Args:
        query: (D,).
        rows: (n, D).
        k: At least 1.
        leave_out: Index to exclude.

    Raises:
        ValueError: k is below 1, the widths differ, or no row is left to search.
    """
    if k < 1:
        raise ValueError(f"k={k} images were requested: pass at least 1.")
    if rows.ndim != 2 or rows.shape[1] != len(query):
        raise ValueError(
            f"the embeddings have shape {tuple(rows.shape)}, and the backbone has {len(query)} features: pass the "
            "backbone of the embeddings"
        )
    direction = F.normalize(query.float(), dim=0)
    cosines = torch.cat([F.normalize(piece.float(), dim=1) @ direction for piece in torch.split(rows, PIECE)])
    if leave_out is not None:
        cosines[leave_out] = -torch.inf
    count = len(rows) - (leave_out is not None)
    if not count:
        raise ValueError("the embeddings contain only the query image: embed more images")
    best = cosines.topk(min(k, count))
    return Nearest(best.indices.tolist(), best.values.tolist())


def embedded_alike(image: ImageArray, model: FeatureNetwork, embeddings: Embeddings, path: Path, size: int) -> Tensor:
    """The row (D,) of another image, with the size and pooling stated in the embedding file.

    Args:
        image: RGB, uint8 (H, W, 3).
        model: Backbone of the embeddings.
        embeddings: Embeddings with metadata.
        path: The file, for errors.
        size: Side of images if the file does not state it.

    Raises:
        ValueError: The file contains feature maps, or states an invalid size or pooling.
    """
    from torchvision.transforms.v2.functional import resize

    pooling = embeddings.about.get("pooling", "avg")
    try:
        sides = json.loads(embeddings.about.get("size", json.dumps([size, size])))
    except ValueError:
        sides = None
    if pooling == "patches" or embeddings.rows.ndim != 2:
        raise ValueError(
            f"{path} contains feature maps, but search needs pooled embeddings: run mlssl predict without --patches"
        )
    is_pair = isinstance(sides, list) and len(sides) == 2
    if (
        not is_pair
        or not all(type(side) is int and 0 < side <= 4096 for side in sides)
        or pooling not in get_args(Pooling)
    ):
        raise ValueError(f"{path} states the size {sides!r:.40} and the pooling {pooling!r:.40}: write it again")
    check_image_size(model.backbone, *sides)
    pixels = resize(torch.tensor(image).permute(2, 0, 1), sides, antialias=True)
    with torch.no_grad():
        row: Tensor = FeatureRows(model, pooling).eval()(pixels[None])[0]  # type: ignore[arg-type]
    return row


def check_first_row(
    first: Path, white: float | None, model: FeatureNetwork, embeddings: Embeddings, path: Path, size: int
) -> None:
    """Refuse embeddings of another backbone or of other images, by embedding their first image again.

    Args:
        first: File of the first image.
        white: White level of images of more than 8 bits, see `rgb_pixels`.
        model: As for `embedded_alike`, like the following ones.
        embeddings: Embeddings with metadata.
        path: The file, for errors.
        size: Side of images if the file does not state it.

    Raises:
        FileNotFoundError: The first image is missing.
        ValueError: As `embedded_alike`; also, its features are not the first row.
    """
    if not first.is_file():
        raise FileNotFoundError(
            f"{path} is of images that are not there, first {first}: pass the folder of its mlssl predict"
        )
    row = embedded_alike(decode_rgb(first, white=white), model, embeddings, path, size)
    if same_features(row, embeddings.rows[0]):
        return
    source = embeddings.about.get("source")
    given = f", which was given {source!r:.200}" if source else f", and its --size ({size} was assumed)"
    raise ValueError(
        f"{path} does not contain this backbone's features of {embeddings.names[0]}: pass the backbone and the folder "
        f"of its mlssl predict{given}, or write it again"
    )
