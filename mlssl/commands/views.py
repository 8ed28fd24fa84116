"""`mlssl views`: draw the views that a network is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_GRID = ("rows", "cols", "overlap")
_SETTINGS = ("size", *_GRID, "branches", "regions", "local_views", "white")
"""Settings of the data that affect how an image is read and views are made."""


def views(
    image: Path,
    branches: str | None = None,
    regions: str | None = None,
    local_views: str | None = None,
    size: int | None = None,
    rows: int | None = None,
    cols: int | None = None,
    overlap: float | None = None,
    white: float | None = None,
    config: Path | None = None,
    recipe: str | None = None,
    backbone: str | None = None,
    seed: int = 0,
    output: Path = Path("views.png"),
) -> None:
    """Draw an image with its blocks and the views that a run makes of them, and which parts a backbone finds similar.

    Example: mlssl views photo.jpg --branches gray -o views.png

    Args:
        image: File to read.
        branches: Augmentation: paper, soft, gray, overhead, or a list in YAML as for --data.branches of fit, such as
            '[{hue: 0.05}, {blur_probability: 0}]'.
        regions: Import path of a function that gives the blocks in place of a grid.
        local_views: Additional small views of the whole image, in YAML, such as '{count: 4, size: 96}'.
        size: Side of a view in pixels; 224 by default.
        rows: Rows of the block grid; 2 by default.
        cols: Columns of the block grid; 2 by default.
        overlap: Fraction of the image side by which blocks overlap, 0–0.5; 0.2 by default.
        white: Value of white in gray images of more than 8 bits.
        config: YAML of a run, such as its config.yaml, for options not given here.
        recipe: Name or YAML file of a recipe, for options given in neither.
        backbone: Checkpoint, exported file, NAME=FILE, or NAME (untrained): also draws OUTPUT-alike.png, how similar it
            finds the blocks to each other and to every part of the image.
        seed: Seed of the augmentation and of untrained weights.
        output: PNG to write; an existing one is replaced.
    """
    import numpy as np

    from mlssl.commands.custom_code import make_importable
    from mlssl.data.decoding import decode_rgb
    from mlssl.drawing.views import ENLARGED, draw_view_grid, enlargements
    from mlssl.safe_yaml import parse_yaml
    from mlssl.views.blocks import BlockViews

    given: dict[str, Any] = {"size": size, "rows": rows, "cols": cols, "overlap": overlap, "white": white}
    for name, text in (("branches", branches), ("regions", regions), ("local_views", local_views)):
        given[name] = None if text is None else parse_yaml(text, f"--{name}")
    make_importable()  # branches and regions may be import paths
    settings = _settings({name: one for name, one in given.items() if one is not None}, config, recipe)
    white = settings.pop("white", None)
    views_of = BlockViews(**settings)
    pixels = decode_rgb(image, white=white)
    drawn = views_of.arrays(pixels, np.random.default_rng(seed))
    boxes = views_of.boxes(*pixels.shape[:2])
    local = drawn.get("local_views")
    enlarged = enlargements(drawn["boxes"], pixels.shape[0], pixels.shape[1], views_of.size)
    title = f"{image.name}, {pixels.shape[0]} × {pixels.shape[1]} pixels\n{_describe_views(views_of, settings)}"
    draw_view_grid(pixels, drawn["views"], boxes, path=output, title=title, local_views=local, enlarged=enlarged)
    also = "" if local is None else f" and {len(local)} local views"
    blocks = views_of.num_blocks
    print(f"{output}: {image.name} with {blocks} blocks and {blocks * views_of.num_branches} views{also}")
    print(_describe_views(views_of, settings))
    if enlarged.max() > ENLARGED:
        number = int((enlarged > ENLARGED).sum())
        print(
            f"warning: {number} of {enlarged.size} views enlarge the image, up to {enlarged.max():.1f} times, and are "
            f"blurred: pass a smaller --size than {views_of.size}, fewer blocks, or larger images"
        )
    if backbone is not None:
        from mlssl.drawing.similar import draw_similarities
        from mlssl.evaluation.similar import block_similarities
        from mlssl.weights.sources import open_backbone

        alike = output.with_name(f"{output.stem}-alike.png")
        similarities = block_similarities(open_backbone(backbone, seed=seed), pixels, boxes, views_of.size)
        draw_similarities(pixels, boxes, similarities, alike, f"{image.name} under {Path(backbone).name}")
        print(f"{alike}: which parts of the image are similar")


def _describe_views(views_of: Any, settings: dict[str, Any]) -> str:
    """Size, blocks and branches of the views."""
    blocks = (
        f"{views_of.num_blocks} regions"
        if views_of.regions
        else f"grid {views_of.rows} × {views_of.cols}, overlap {views_of.overlap:g}"
    )
    branches = settings.get("branches", "paper")
    named = branches if isinstance(branches, str) else f"{views_of.num_branches} custom"
    return f"views of {views_of.size} × {views_of.size} pixels, {blocks}, branches: {named}"


def _settings(given: dict[str, Any], config: Path | None, recipe_name: str | None) -> dict[str, Any]:
    """Arguments of `BlockViews`, and `white`: given ones override the config, which overrides the recipe."""
    from mlssl.recipes import recipe

    file = {} if config is None else _read_config(config)
    name = recipe_name or file.get("recipe")
    defaults = {**(recipe(str(name))["data"] if name else {}), **(file.get("data") or {})}
    # Regions replace the grid, so giving one drops the other.
    replaced = _GRID if "regions" in given else ("regions",) if given.keys() & set(_GRID) else ()
    defaults = {key: value for key, value in defaults.items() if key not in replaced and value is not None}
    return {key: value for key, value in {**defaults, **given}.items() if key in _SETTINGS}


def _read_config(path: Path) -> dict[str, Any]:
    from mlssl.safe_yaml import read_yaml

    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}: pass the YAML of a run, such as runs/NAME-<time>/config.yaml")
    content = read_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("data") or {}, dict):
        raise ValueError(f"{path} is not the config of a run: pass a YAML file for mlssl fit --config")
    return content
