"""`mlssl views`: the picture of the views that a run makes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mlssl.drawing.views
from mlssl.cli import main

MODULE = """
def my_regions(height, width):
    return [(0, 0, height, width)]


def my_branch(block, generator):
    return block[:32, :32].transpose(2, 0, 1)
"""


@pytest.fixture(autouse=True)
def _with_a_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of the last picture."""
    noted: dict[str, Any] = {}

    def note(image: Any, views: Any, boxes: Any, **settings: Any) -> None:
        noted.update(image=image, views=views, boxes=boxes, **settings)

    monkeypatch.setattr(mlssl.drawing.views, "draw_view_grid", note)
    return noted


def test_a_picture_is_written_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["views", "photo.png", "-o", "grid.png", "--size", "32", "--local_views", "{count: 3, size: 16}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "grid.png: photo.png with 4 blocks and 8 views and 3 local views"
    assert lines[1] == "views of 32 × 32 pixels, grid 2 × 2, overlap 0.2, branches: paper"
    with Image.open("grid.png") as picture:
        assert min(picture.size) > 200


def test_the_views_are_those_of_blockviews(drawn: dict[str, Any]) -> None:
    assert main(["views", "photo.png", "--size", "32", "--branches", "soft", "--seed", "3"]) == 0
    expected = mlssl.BlockViews(size=32, branches="soft")(drawn["image"], np.random.default_rng(3))
    assert np.array_equal(drawn["views"], expected.numpy())


@pytest.mark.parametrize(
    ("words", "shape", "boxes"),
    [
        (["--size", "32"], (2, 4, 3, 32, 32), 4),
        (["--size", "32", "--rows", "1", "--cols", "3", "--overlap", "0"], (2, 3, 3, 32, 32), 3),
        (["--size", "32", "--branches", "[{hue: 0.05}, {hue: 0.1}, {hue: 0.2}]"], (3, 4, 3, 32, 32), 4),
        (["--size", "32", "--regions", "own_of_views.my_regions"], (2, 1, 3, 32, 32), 1),
        (["--size", "32", "--branches", "[own_of_views.my_branch]"], (1, 4, 3, 32, 32), 4),
        (["--config", "run.yaml"], (1, 3, 3, 48, 48), 3),
        (["--config", "run.yaml", "--size", "32", "--cols", "2"], (1, 2, 3, 32, 32), 2),
        (["--config", "run.yaml", "--branches", "gray"], (2, 3, 3, 48, 48), 3),
        (["--config", "run.yaml", "--regions", "own_of_views.my_regions"], (1, 1, 3, 48, 48), 1),
        (["--config", "of_regions.yaml", "--size", "32"], (2, 1, 3, 32, 32), 1),
        (["--config", "of_regions.yaml", "--size", "32", "--rows", "1"], (2, 2, 3, 32, 32), 2),
        (["--config", "of_a_recipe.yaml"], (1, 1, 3, 32, 32), 1),
        (["--recipe", "mine.yaml"], (1, 1, 3, 40, 40), 1),
        (["--recipe", "mine.yaml", "--config", "run.yaml"], (1, 3, 3, 48, 48), 3),
    ],
)
def test_words_override_a_config_which_overrides_a_recipe(
    words: list[str], shape: tuple[int, ...], boxes: int, drawn: dict[str, Any]
) -> None:
    Path("own_of_views.py").write_text(MODULE)
    Path("run.yaml").write_text(
        "model: {base_lr: 0.1}\n"
        "data: {dataset: coco, root: null, size: 48, rows: 1, cols: 3, overlap: 0.1, branches: [{hue: 0}]}\n"
    )
    Path("of_regions.yaml").write_text("data: {regions: own_of_views.my_regions, rows: 2, cols: 2, overlap: 0.2}\n")
    Path("mine.yaml").write_text("data: {size: 40, rows: 1, cols: 1, branches: [{}]}\n")
    Path("of_a_recipe.yaml").write_text("recipe: mine.yaml\ndata: {size: 32}\n")
    assert main(["views", "photo.png", *words]) == 0
    assert drawn["views"].shape == shape
    assert len(drawn["boxes"]) == boxes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--branches", "papre"], "there is no preset of branches 'papre', did you mean 'paper'?"),
        (["--branches", "[{huge: 1}]"], "hue"),
        (["--branches", "[{"], "--branches cannot be read as YAML"),
        (["--regions", "nowhere.regions"], "nowhere"),
        (
            ["--config", "nowhere.yaml"],
            "no file 'nowhere.yaml': pass the YAML of a run, such as runs/",
        ),
        (
            ["--config", "list.yaml"],
            "list.yaml is not the config of a run: pass a YAML file for mlssl",
        ),
        (["--recipe", "papre"], "recipe 'papre' is unknown: did you mean 'paper'"),
        (["--overlap", "0.7"], "overlap"),
    ],
)
def test_bad_input_is_reported_in_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("list.yaml").write_text("[1]")
    assert main(["views", "photo.png", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("mlssl: error: ")
    assert message in line
    assert not Path("views.png").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--size", "20"], "views of 20 × 20 pixels, grid 2 × 2, overlap 0.2, branches: paper"),
        (["--size", "96", "--branches", "soft"], "views of 96 × 96 pixels, grid 2 × 2, overlap 0.2, branches: soft"),
        (["--size", "96", "--branches", "[{}]"], "grid 2 × 2, overlap 0.2, branches: 1 custom"),
    ],
)
def test_the_drawing_is_described_and_views_that_enlarge_the_image_are_warned_of(
    words: list[str], said: str, drawn: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["views", "photo.png", *words]) == 0
    printed = capsys.readouterr().out
    assert said in printed
    assert drawn["title"].startswith("photo.png, 90 × 120 pixels\n")
    assert said in drawn["title"]
    count = int((drawn["enlarged"] > 1.05).sum())
    assert ("views enlarge the image" in printed) == (count > 0) == ("96" in words)
    if count:
        assert f"warning: {count} of {drawn['enlarged'].size} views enlarge the image, up to " in printed
        assert "pass a smaller --size than 96" in printed
