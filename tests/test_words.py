"""Names that matplotlib would read as formulas, and file names that are not UTF-8, in figures, tables and pages."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mlssl.cli import main
from mlssl.commands.results import BackboneResult, differences, write_results
from mlssl.drawing.run import (
    figure_of_classes,
    figure_of_cosines,
    figure_of_curves,
    figure_of_map,
    figure_of_panels,
    svg,
)
from mlssl.drawing.words import plain
from mlssl.evaluation.bootstrap import Resampled
from mlssl.evaluation.classes import ClassCounts
from mlssl.report.page import Page, write_page

NAMES = ["under $10^_ or $20", "$", "$$", "a\\$b$c", "$\\frac$", "50 % of $x_{$", "caf\udce9", "{}^_", "na\u0308me"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_drawn_with_any_name(name: str, tmp_path: Path) -> None:
    shown = name.encode("utf-8", "backslashreplace").decode()
    places = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    for figure in (
        figure_of_curves({name: ([1, 2], [3, 4])}, name, name, {f"{name} level": 3.5}),
        figure_of_map(places, (0.6, 0.2), [0, 1], [name, "other"]),
        figure_of_cosines({name: {"same_block": torch.tensor([0.1, 0.2])}}),
        figure_of_classes({name: torch.tensor([0.5, 0.7])}, [name, "other"]),
        figure_of_panels({name: {name: ([1, 2], [3, 4])}}),
    ):
        text = svg(figure, "figure")
        drawn = text.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
        assert shown in drawn
    resampled = Resampled(torch.tensor([0.5, 0.6]), torch.tensor([[0.4, 0.6], [0.6, 0.8]]))
    numbers = {"mAP": 0.6, "interval": (0.5, 0.7)}
    found = [BackboneResult(f"{name}.ckpt", {}, numbers, torch.tensor([0.5, 0.7]), resampled) for _ in range(2)]
    counts = ClassCounts([name, "other"], [3, 4], [5, 60])
    folder = write_results(str(tmp_path), "linear", found, differences(found), counts, {"root": name})
    assert (folder / "average_precision.png").stat().st_size > 0
    with (folder / "classes.csv").open(encoding="utf-8", newline="") as file:
        assert next(row for row in csv.reader(file) if row[0] == shown)[1:] == ["3", "5", "0.5", "0.5"]
    write_page(Page(name, name, (), {name: name}, (), ()), tmp_path / "page.html")
    assert "<html" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_plain_words_do_not_change() -> None:
    for words in ("sky", "caf\u00e9", "a_b^c", "\u732b"):
        assert plain(words) == words


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate([b"1.jpg", b"2.jpg", b"caf\xe9.jpg", b"a$0^_$b.jpg"]):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / os.fsdecode(name))
    return tmp_path


@pytest.mark.parametrize("query", [b"1.jpg", b"a$0^_$b.jpg"])
def test_neighbors_and_views_of_such_files(folder: Path, query: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(folder / os.fsdecode(query))
    words = ["--backbone", "test_resnet", "--size", "32", "-o", str(folder / "out.png")]
    assert main(["neighbors", image, str(folder), *words]) == 0
    printed = capsys.readouterr().out
    assert printed.count(".jpg\n") == 3
    assert "caf\\udce9.jpg" in printed
    assert main(["views", image, "--size", "32", "-o", str(folder / "views.png")]) == 0
    assert (folder / "out.png").is_file()
    assert (folder / "views.png").is_file()
