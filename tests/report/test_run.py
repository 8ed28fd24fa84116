"""The report on a run: its contents, no network requests, and rendering in a real browser."""

from __future__ import annotations

import importlib.util
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
from mlssl.report.networks import network_at_end, network_at_start
from mlssl.report.run import write_report
from mlssl.run_folder import last_checkpoint, read_config, read_log
from mlssl.weights.checkpoints import load_checkpoint

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


def test_the_page_is_in_the_run_folder_and_has_every_figure(page, drawn_run):
    assert page == drawn_run / "report.html"
    text = page.read_text()
    assert all(f'id="{name}"' in text for name in [*FIGURES, "neighbors", "views"])
    assert text.count('class="card verdict') == 3
    assert text.count("Too early to say.") == 2, "a run of six steps"
    for words in (
        "mlssl fit --config ",
        "mlssl fit --model.backbone test_resnet",
        "lightning 2",
        "for 6 steps",
        "whole images of 32 × 32 pixels, pooling avgmax",
    ):
        assert words in text.replace('<span class="word">', "").replace("</span>", "")
    assert text.count("effective rank") == 1, "of one thing only"
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_the_page_makes_no_network_requests(page):
    text = page.read_text()
    addresses = set(re.findall(r'(?:src|href)="([^"]{0,40})', text)) | set(re.findall(r"url\(([^)]{0,40})", text))
    assert all(address.startswith(("data:", "#", "${sprite}")) for address in addresses), addresses
    assert "default-src 'none'" in text
    assert len(text) < 3_000_000


def test_a_run_without_labels_has_no_probe_and_says_so(unlabelled_page):
    text = unlabelled_page.read_text()
    assert unlabelled_page.name == "elsewhere.html"
    assert 'id="classes"' not in text
    assert "There is no probe, because the training or the val set has no labels" in text
    assert all(f'id="{name}"' in text for name in ("loss", "cosines", "spectrum", "map", "neighbors"))
    assert "<b>&" not in text  # names of files are escaped


def test_the_initial_network_is_rebuilt_exactly(fit):
    run = fit("--model.base_lr", "0", "--model.weight_decay", "0")
    path = last_checkpoint(run)
    content, seed = load_checkpoint(path), read_config(run)["seed_everything"]
    start, end = network_at_start(content, path, seed, {}), network_at_end(content, path)
    module = MultiLabelSSLModule.load_from_checkpoint(path, weights_only=True)
    for part in ("backbone", "projector"):
        trained, begun, other = (
            dict(getattr(one, part).named_parameters())
            for one in (end, start, network_at_start(content, path, seed + 1, {}))
        )
        assert all(torch.equal(trained[name], value) for name, value in getattr(module, part).named_parameters())
        assert all(torch.equal(begun[name], value) for name, value in trained.items())
        assert any(not torch.equal(other[name], value) for name, value in trained.items())


def test_building_the_initial_network_keeps_the_random_state(drawn_run):
    path = last_checkpoint(drawn_run)
    before = torch.random.get_rng_state()
    network_at_start(load_checkpoint(path), path, 3)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_log_is_read_by_name(drawn_run):
    log = read_log(drawn_run)
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
def test_a_folder_that_is_not_a_run_is_refused_in_one_sentence(prepare, message, tmp_path, capsys):
    prepare(tmp_path / "run")
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        write_report(tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.html"))


def test_a_truncated_checkpoint_is_refused(drawn_run, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "metrics.csv"):
        (folder / name).write_bytes((drawn_run / name).read_bytes())
    (folder / "checkpoints" / "last.ckpt").write_bytes((drawn_run / "checkpoints" / "last.ckpt").read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not a checkpoint or is damaged"):
        write_report(folder)


def test_a_run_with_a_sharded_checkpoint_has_a_report(drawn_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(drawn_run, folder, ignore=shutil.ignore_patterns("*.ckpt"))
    whole = last_checkpoint(drawn_run)
    shards = in_shards(whole, folder / "checkpoints" / "last.ckpt")
    state = network_at_end(load_checkpoint(shards), shards).state_dict()
    expected = network_at_end(load_checkpoint(whole), whole).state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert write_report(folder, max_images=20, num_workers=0).is_file()


def copied(run, folder, checkpoint=None, **changes):
    """A copy of a run with other settings, and another checkpoint if one is given."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("report.html"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if checkpoint is not None:
        torch.save(checkpoint, last_checkpoint(folder))
    return folder


@pytest.fixture
def nothing_is_imported(monkeypatch):
    """Fail the test if a user's module is imported."""
    find = importlib.util.find_spec

    def watched(name, *args, **kwargs):
        assert "elsewhere" not in name
        return find(name, *args, **kwargs)

    monkeypatch.setattr(importlib.util, "find_spec", watched)
    load = importlib.import_module

    def checked(name, *args):  # a first figure imports matplotlib's own modules in this way
        assert "elsewhere" not in name
        return load(name, *args)

    monkeypatch.setattr(importlib, "import_module", checked)


def test_a_custom_class_is_named_and_its_backbone_measured(drawn_run, tmp_path, nothing_is_imported):
    run = copied(drawn_run, tmp_path / "run", model_class="elsewhere.own.<Module>", model={"unknown": "argument"})
    text = write_report(run, max_images=20, num_workers=0).read_text()
    assert "elsewhere.own.&lt;Module&gt;" in text
    assert "a new network of this architecture, built with the run" in text
    assert all(f'id="{name}"' in text for name in [*FIGURES, "neighbors"])


def test_views_of_a_custom_branch_are_replaced_by_the_librarys(drawn_run, tmp_path, nothing_is_imported):
    branches = [{"class_path": "elsewhere.own.Branch"}, "elsewhere/pipeline.yaml"]
    run = copied(drawn_run, tmp_path / "run", data={"branches": branches, "regions": "elsewhere.own.regions"})
    text = write_report(run, max_images=20, num_workers=0).read_text()
    assert "branches and regions are custom, which the report does not import" in text
    assert "elsewhere.own.Branch" in text
    assert 'id="cosines"' in text


def test_the_images_of_a_custom_datamodule_are_not_read(drawn_run, tmp_path, nothing_is_imported):
    run = copied(drawn_run, tmp_path / "run", data_class="elsewhere.own.Data")
    text = write_report(run, num_workers=0).read_text()
    assert "The images come from elsewhere.own.Data, which the report does not import" in text
    assert all(f'id="{name}"' in text for name in ("loss", "lr", "quality"))
    assert 'id="cosines"' not in text


def test_without_a_backbone_name_only_the_log_is_shown(drawn_run, tmp_path):
    checkpoint = load_checkpoint(last_checkpoint(drawn_run))
    checkpoint["hyper_parameters"]["backbone"] = None
    checkpoint.pop("backbone", None)
    run = copied(drawn_run, tmp_path / "run", checkpoint)
    text = write_report(run, num_workers=0).read_text()
    assert "does not name its backbone" in text
    assert 'id="loss"' in text
    assert 'id="cosines"' not in text


def test_without_the_librarys_projector_views_are_compared_by_features(drawn_run, tmp_path):
    checkpoint = load_checkpoint(last_checkpoint(drawn_run))
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name.replace("projector.6", "projector.9"): value for name, value in state.items()}
    run = copied(drawn_run, tmp_path / "run", checkpoint)
    text = write_report(run, max_images=20, num_workers=0).read_text()
    assert "views are compared by features of the backbone" in text


def test_too_few_images_are_refused(drawn_run):
    with pytest.raises(ValueError, match="max_images=1 was given"):
        write_report(drawn_run, max_images=1)


def _config(folder: Path, settings: dict) -> None:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))


@pytest.mark.slow
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
    assert time.perf_counter() - start < 10  # about a second on an idle machine
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
    for name in FIGURES[:-1]:
        chart = tab.locator(f"#{name} .plot").first
        chart.scroll_into_view_if_needed()
        x, y, words = chart.evaluate(
            """one => {
              const [x, y, words] = JSON.parse(one.querySelector("script").textContent)[0];
              const at = new DOMPoint(x, y).matrixTransform(one.querySelector("svg").getScreenCTM());
              return [at.x, at.y, words];
            }"""
        )
        tab.mouse.move(x, y)
        assert chart.locator(".tip").inner_text() == words
    tab.close()


def test_theme_map_and_class_answer_to_mouse_and_keyboard(page, browser):
    tab = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
    tab.goto(page.as_uri())
    tab.click("#theme")
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"
    tab.click("#theme")
    assert tab.evaluate("document.documentElement.dataset.theme") == "light"
    tip = tab.locator(".map-box .tip").first
    assert not tip.is_visible()
    tab.locator("#map [id$='-points'] use").first.hover(force=True)
    assert tip.is_visible()
    assert re.match(r"\d{6}: \w+", tip.locator("span").inner_text())
    tab.locator(".map-box").first.focus()
    tab.keyboard.press("ArrowRight")
    first = tip.locator("span").inner_text()
    tab.keyboard.press("ArrowRight")
    assert tip.locator("span").inner_text() != first
    tab.keyboard.press("Escape")
    assert not tip.is_visible()
    tab.select_option("#class", index=1)
    marks = tab.locator("#map [id$='-points'] use").count()
    assert 0 < tab.locator("#map use.dim").count() < marks
    tab.close()
