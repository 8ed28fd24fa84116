"""One page about several runs, and the parts of a page that need no run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from test_run_record import SESSION

from mlssl.cli import main
from mlssl.drawing.run import figure_of_classes, figure_of_curves, figure_of_panels, hover_points, svg
from mlssl.evaluation.geometry import neighbor_map
from mlssl.report.compare import differing_settings, write_comparison
from mlssl.report.facts import facts_of
from mlssl.run_folder import Log
from mlssl.run_record import write_record

CONFIG = {"seed_everything": 0, "model": {"base_lr": 0.1}, "data": {"root": "photos"}, "trainer": {"max_epochs": 3}}


@pytest.fixture
def two_runs(drawn_run: Path, tmp_path: Path) -> list[Path]:
    """A run, and the same under another name and another learning rate."""
    other = tmp_path / "other"
    shutil.copytree(drawn_run, other)
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["model"]["base_lr"] = 0.7
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    return [drawn_run, other]


ROWS = "[...document.querySelectorAll('.runs tr')].map(row => [...row.children].map(cell => cell.textContent.trim()))"
OUTSIDE = """[...document.querySelectorAll('.runs td')].filter(cell => cell.getBoundingClientRect().right > innerWidth)
.map(cell => cell.textContent)"""
"""Cells that a reader at this width does not see."""


def test_two_runs_are_compared_on_one_page(
    two_runs: list[Path], tmp_path: Path, browser, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "both.html"
    words = [*map(str, two_runs), "-o", str(page), "--max_images", "60", "--num_workers", "0"]
    assert main(["report", *words]) == 0
    text = page.read_text()
    name = two_runs[0].name
    assert "trained on 60 training images, scored on 60 val images" in text
    tab = browser.new_page(viewport={"width": 400, "height": 900}, color_scheme="dark")
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(page.as_uri())
    assert said == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400
    rows = tab.evaluate(ROWS)
    assert ["model.base_lr", "0.05", "0.7"] in rows
    assert "data.size" not in [row[0] for row in rows]
    assert [f"other − {name}", "+0.000", "+0.000 to +0.000", "no"] in rows
    assert tab.evaluate(OUTSIDE) == []
    for chart in ("loss", "lr", "speed", "probe"):
        assert name in tab.locator(f"#{chart} svg").text_content()
    tab.close()


def test_runs_on_different_images_are_not_scored(two_runs: list[Path], tmp_path: Path) -> None:
    path = two_runs[1] / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["data"]["root"] = "elsewhere"
    path.write_text(yaml.safe_dump(config))
    text = write_comparison(two_runs, tmp_path / "both.html", num_workers=0).read_text()
    assert "The runs differ in data.root, so they cannot be scored on the same images." in text
    assert "probe mAP" not in text


def test_fewer_than_two_runs_or_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 runs were given, or one of them twice: pass two or more different runs"):
        write_comparison([tmp_path, tmp_path / "."], tmp_path / "both.html")
    with pytest.raises(ValueError, match="max_images=1 was given"):
        write_comparison([tmp_path, tmp_path / "b"], tmp_path / "both.html", max_images=1)


def test_settings_that_differ_are_listed_by_their_full_name() -> None:
    other = {**CONFIG, "model": {"base_lr": 0.2, "form": "mean_of_logs"}, "data": {"root": "photos"}}
    table = differing_settings({"a": CONFIG, "b": other})
    assert table.rows == [["model.base_lr", "0.1", "0.2"], ["model.form", "–", "mean_of_logs"]]
    assert differing_settings({"a": CONFIG, "b": CONFIG}).caption == "No setting differs."


def test_facts_come_from_the_run_record_in_any_folder(tmp_path: Path) -> None:
    log = {"train/loss": Log([49, 99], [0, 1], [3.0, 2.0])}
    first = replace(SESSION, seconds=100.0, last_step=50, outcome="interrupted", ended="2025-01-02T03:06:00+01:00")
    again = replace(first, command="mlssl fit --resume runs/a", first_step=50, last_step=100, outcome="done")
    write_record(tmp_path, [first, again])
    facts = facts_of(tmp_path, CONFIG, log)
    assert facts["started"] == "2025-01-02 03:04"
    assert facts["duration"] == "3 min 20 s for 100 steps, in 2 sessions"
    assert (facts["command"], facts["continued by"]) == ("mlssl fit", "mlssl fit --resume runs/a")
    assert (facts["steps"], facts["data folder"], facts["versions"]) == ("100", "photos", "torch 2")
    assert facts["code"] == "commit abc of /home/me, 2 files changed"
    assert facts["hardware"] == "2 × H200 (150.0 GB); EPYC, 8 cores, 1 thread"
    assert facts["train set at the start"] == "100 images, 5 classes, 1.5 labels per image"


def test_an_unfinished_session_is_reported_as_such(tmp_path: Path) -> None:
    write_record(tmp_path, [replace(SESSION, seconds=60.0, last_step=10)])
    assert facts_of(tmp_path, CONFIG, {})["duration"].endswith("it has not ended, or was killed")
    write_record(tmp_path, [replace(SESSION, outcome="failed: ValueError")])
    assert facts_of(tmp_path, CONFIG, {})["duration"].endswith("; failed: ValueError")


def test_a_damaged_record_is_reported_and_the_other_facts_are_shown(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"sessions": [{"started"')
    with pytest.warns(UserWarning, match="is not the record of a run or is damaged"):
        facts = facts_of(tmp_path, CONFIG, {})
    assert "run.json is not the record of a run" in facts["record"]
    assert facts["data folder"] == "photos"
    (tmp_path / "run.json").unlink()
    assert facts_of(tmp_path, CONFIG, {})["record"].startswith("no run.json: command, versions")


def test_hover_points_match_the_plotted_points() -> None:
    figure = figure_of_curves({"rate": ([0, 10], [1.0, 3.0])}, "images/s", from_zero=True)
    svg(figure, "speed")
    (left, low, words), (right, high, last) = hover_points(figure)
    assert (words, last) == ("step 0: rate 1", "step 10: rate 3")
    assert left < right
    assert low > high, "y of an SVG runs downwards"
    assert figure.axes[0].get_ylim()[0] == 0
    classes = figure_of_classes({"end": torch.tensor([0.2, 0.9])}, ["sky 30", "cow 4*"])
    svg(classes, "classes")
    assert [words for *_, words in hover_points(classes)] == ["cow 4*: end 0.9", "sky 30: end 0.2"]


def test_each_loss_has_a_panel_with_its_own_scale() -> None:
    figure = figure_of_panels({"total": {"total": ([0, 1], [5, 4])}, "pair": {"pair": ([0, 1], [-0.1, -0.2])}})
    assert [axes.get_ylabel() for axes in figure.axes] == ["total", "pair"]
    assert figure.axes[0].get_ylim()[0] > 3


def test_of_many_classes_the_best_and_the_worst_are_plotted() -> None:
    precisions = torch.linspace(0, 1, 200)
    figure = figure_of_classes({"end": precisions}, [f"class {number}" for number in range(200)])
    words = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(words) == 60
    assert (words[0], words[-1]) == ("class 199", "class 0")


def test_t_sne_is_used_if_it_preserves_neighbours_better_than_pca() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 5 * torch.eye(8).repeat_interleave(5, dim=0)  # eight groups, which two dimensions cannot separate
    found = neighbor_map(centres + 0.1 * torch.randn(40, 8, generator=generator))
    assert found is not None
    positions, kept, of_pca = found
    assert positions.shape == (40, 2)
    assert 0.5 < of_pca < kept <= 1
    assert neighbor_map(centres[:19]) is None
