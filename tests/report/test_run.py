"""The page about a run: what it says, that nothing is asked of the network, and that a real browser shows it."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from test_export import in_shards

from mlssl.cli import main
from mlssl.data.readers.synthetic import synthetic_scenes
from mlssl.module import MultiLabelSSLModule
from mlssl.report.measure import some_images
from mlssl.report.run import _loaded, _untrained, last_checkpoint, read_config, read_log, write_report

FIGURES = ["loss", "lr", "speed", "time", "quality", "classes", "cosines", "spectrum", "map"]


@pytest.fixture(scope="module")
def page(drawn_run: Path) -> Path:
    return write_report(drawn_run, max_images=60, num_workers=0)


@pytest.fixture(scope="module")
def unlabelled_page(fit, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    scenes = synthetic_scenes("train", size=48, count=24)
    for line in range(len(scenes)):
        Image.fromarray(scenes.image(line)).save(folder / f"<b>&{line}.png")
    run = fit("--name", "folder", "--data.dataset", "folder", "--data.root", str(folder))
    return write_report(run, run / "elsewhere.html", num_workers=0)


def test_the_page_stands_in_the_run_and_holds_every_figure(page, drawn_run):
    assert page == drawn_run / "report.html"
    text = page.read_text()
    assert all(f'id="{name}"' in text for name in [*FIGURES, "neighbors", "views"])
    assert text.count('class="card verdict') == 3
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_the_page_asks_the_network_for_nothing(page):
    text = page.read_text()
    addresses = set(re.findall(r'(?:src|href)="([^"]{0,40})', text)) | set(re.findall(r"url\(([^)]{0,40})", text))
    assert all(address.startswith(("data:", "#", "${sprite}")) for address in addresses), addresses
    assert "default-src 'none'" in text
    assert len(text) < 3_000_000


def test_a_run_without_labels_has_no_probe_and_says_so(unlabelled_page):
    text = unlabelled_page.read_text()
    assert unlabelled_page.name == "elsewhere.html"
    assert 'id="classes"' not in text
    assert "Without labels in the training and the val set there is no probe" in text
    assert all(f'id="{name}"' in text for name in ("loss", "cosines", "spectrum", "map", "neighbors"))
    assert "<b>&" not in text  # names of files are escaped


def test_the_network_of_the_start_is_the_one_that_the_run_began_with(fit):
    run = fit("--model.base_lr", "0", "--model.weight_decay", "0")
    config = read_config(run)
    start = dict(_untrained(config["model"], config["seed_everything"]).named_parameters())
    end = MultiLabelSSLModule.load_from_checkpoint(last_checkpoint(run), weights_only=True)
    assert all(torch.equal(start[name], value) for name, value in end.named_parameters())
    other = dict(_untrained(config["model"], 1).named_parameters())
    assert any(not torch.equal(other[name], value) for name, value in end.named_parameters())


def test_the_log_is_read_by_name(drawn_run):
    log = read_log(drawn_run / "metrics.csv")
    assert log["train/loss"].steps == sorted(log["train/loss"].steps)
    assert len(log["train/loss"].values) == 6
    assert len(log["train/lr"].values) == 6


def test_some_images_are_spread_over_all():
    records = synthetic_scenes("train", size=32, count=11)
    assert some_images(records, 3).image_ids.tolist() == [0, 5, 10]
    assert some_images(records, 11) is records


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "no folder .*pass the folder of a run"),
        (lambda folder: folder.mkdir(), "no config.yaml in"),
        (lambda folder: _config(folder, {"a": 1}), "is not the config of a run"),
        (
            lambda folder: _config(folder, {"seed_everything": 0, "model": {}, "data": {}, "trainer": {}}),
            "no checkpoint",
        ),
    ],
)
def test_a_folder_that_is_no_run_is_refused_in_one_sentence(prepare, message, tmp_path, capsys):
    prepare(tmp_path / "run")
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        write_report(tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.html"))


def test_a_checkpoint_that_is_cut_off_is_refused(drawn_run, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "metrics.csv"):
        (folder / name).write_bytes((drawn_run / name).read_bytes())
    (folder / "checkpoints" / "last.ckpt").write_bytes((drawn_run / "checkpoints" / "last.ckpt").read_bytes()[:1000])
    with pytest.raises(ValueError, match="does not load as a checkpoint"):
        write_report(folder)


def test_a_run_whose_checkpoint_is_in_shards_has_its_page(drawn_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(drawn_run, folder, ignore=shutil.ignore_patterns("*.ckpt"))
    whole = last_checkpoint(drawn_run)
    state = _loaded(in_shards(whole, folder / "checkpoints" / "last.ckpt")).state_dict()
    assert all(torch.equal(state[name], value) for name, value in _loaded(whole).state_dict().items())
    assert write_report(folder, max_images=20, num_workers=0).is_file()


def test_too_few_images_are_refused(drawn_run):
    with pytest.raises(ValueError, match="max_images=1 was given"):
        write_report(drawn_run, max_images=1)


def _config(folder: Path, settings: dict) -> None:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_shows_every_figure_without_an_error(scheme, width, page, browser):
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    start = time.perf_counter()
    tab.goto(page.as_uri())
    assert time.perf_counter() - start < 10  # a second on a machine that does nothing else
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    for name in FIGURES:
        box = tab.locator(f"#{name} svg").first.bounding_box()
        assert box["width"] > 200
        assert box["height"] > 100
    assert tab.locator("#neighbors img").evaluate_all("all => all.every(one => one.complete && one.naturalWidth > 0)")
    paper = tab.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    tab.close()


def test_theme_map_and_class_answer_to_mouse_and_keyboard(page, browser):
    tab = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
    tab.goto(page.as_uri())
    tab.click("#theme")
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"
    tab.click("#theme")
    assert tab.evaluate("document.documentElement.dataset.theme") == "light"
    assert not tab.locator("#tip").is_visible()
    tab.locator("#map [id$='-points'] use").first.hover(force=True)
    assert tab.locator("#tip").is_visible()
    assert re.match(r"\d{6}: \w+", tab.locator("#tip span").inner_text())
    tab.focus("#map-box")
    tab.keyboard.press("ArrowRight")
    first = tab.locator("#tip span").inner_text()
    tab.keyboard.press("ArrowRight")
    assert tab.locator("#tip span").inner_text() != first
    tab.keyboard.press("Escape")
    assert not tab.locator("#tip").is_visible()
    tab.select_option("#class", index=1)
    marks = tab.locator("#map [id$='-points'] use").count()
    assert 0 < tab.locator("#map use.dim").count() < marks
    tab.close()
