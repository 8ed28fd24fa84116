"""Every example runs; the configs are run in test_cli.py."""

from __future__ import annotations

import math
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

SMALL = {
    "quickstart.py": ["--epochs", "1", "--size", "32", "--batch_size", "8"],
    "own_lightning_project.py": ["--count", "64", "--epochs", "1"],
    "export_table.py": ["--architectures", "[test_resnet, test_vit]", "--formats", "[timm, torchvision]"],
    "plain_pytorch.py": ["--count", "16", "--epochs", "1", "--batch_size", "8"],
}


@pytest.fixture
def photographs(coco256, tmp_path) -> Path:
    """A folder of sixteen small photographs."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for path in sorted(coco256.rglob("*.jpg"))[:16]:
        with Image.open(path) as photograph:
            photograph.resize((96, 64)).save(folder / path.name)
    return folder


def _run(name: str, words: list[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_run_here():
    elsewhere = {"fine_tune.py"}  # in test_transfer_examples.py, as those in detection/
    assert {file.name for file in EXAMPLES.glob("*.py")} - elsewhere == SMALL.keys()


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_the_quickstart_trains_on_a_folder_and_takes_the_backbone_away(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _run("quickstart.py", [*SMALL["quickstart.py"], "--folder", str(photographs)], monkeypatch)
    assert "loads into timm and gives features (1, 512)" in capsys.readouterr().out
    assert list(tmp_path.rglob("backbone.safetensors"))
    assert len(list(tmp_path.rglob("views/*.png"))) == 4


def test_the_module_works_in_a_lightning_project_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _run("own_lightning_project.py", SMALL["own_lightning_project.py"], monkeypatch)
    printed = capsys.readouterr().out
    assert "features (32, 2, 4, 512) (B, A, K, D)" in printed
    assert "features (64, 512) of 64 images" in printed


def test_the_method_runs_in_a_plain_loop_without_lightning(monkeypatch, capsys):
    before = {name for name in sys.modules if name.startswith("lightning")}
    _run("plain_pytorch.py", SMALL["plain_pytorch.py"], monkeypatch)
    assert {name for name in sys.modules if name.startswith("lightning")} == before
    loss = float(capsys.readouterr().out.split()[-1])
    assert math.isfinite(loss)


def test_the_table_of_exports_has_a_number_where_a_format_holds_the_network(monkeypatch, capsys):
    _run("export_table.py", SMALL["export_table.py"], monkeypatch)
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert rows == ["| test_resnet | 0e+00 | — |", "| test_vit | 0e+00 | — |"]


@pytest.mark.parametrize("path", sorted((EXAMPLES / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_opens_with_command_hardware_time_and_number(path):
    text = path.read_text()
    opening = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert f"mlssl fit --config examples/configs/{path.name}" in opening
    assert all(word in opening.lower() for word in ("hardware", "time", "map"))
    assert yaml.safe_load(text)["name"] == path.stem
