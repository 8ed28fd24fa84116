"""Recipes: `paper` equals all defaults, `mlssl` changes six numbers, and a file has the same layout."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from mlssl import MultiLabelDataModule, MultiLabelSSLModule, recipe


def test_the_paper_is_all_defaults() -> None:
    settings = recipe("paper")
    assert settings.keys() == {"data", "model", "callbacks"}
    for part, kind in (("data", MultiLabelDataModule), ("model", MultiLabelSSLModule)):
        parameters = inspect.signature(kind).parameters
        assert settings[part] == {name: parameters[name].default for name in settings[part]}
    assert settings["data"]["overlap"] == 0.2
    assert not {"dataset", "root", "backbone"} & {*settings["data"], *settings["model"]}


def test_mlssl_is_the_paper_with_softer_colours_and_muon() -> None:
    paper, own = recipe("paper"), recipe("mlssl")
    changed = {part: {k: v for k, v in own[part].items() if paper[part].get(k) != v} for part in ("data", "model")}
    assert changed == {
        "data": {"overlap": 0.3, "branches": "soft"},
        "model": {
            "optimizer": "muon",
            "optimizer_kwargs": {"momentum": 0.95, "nesterov": True},
            "base_lr": 2e-3,
            "warmup_epochs": 0.5,
        },
    }
    assert own["callbacks"] == []
    MultiLabelSSLModule("test_resnet", **own["model"])
    MultiLabelDataModule(**own["data"])


def test_each_call_returns_new_settings() -> None:
    first = recipe("paper")
    first["model"]["base_lr"] = 1
    first["callbacks"].append("mine")
    assert recipe("paper")["model"]["base_lr"] == 0.05
    assert recipe("paper")["callbacks"] == []


def test_a_file_has_the_same_layout(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: {base_lr: 0.1}\ncallbacks: [{class_path: mlssl.callbacks.OnlineKNN, init_args: {k: 5}}]\n")
    assert recipe(str(path)) == {
        "data": {},
        "model": {"base_lr": 0.1},
        "callbacks": [{"class_path": "mlssl.callbacks.OnlineKNN", "init_args": {"k": 5}}],
    }
    path.write_text("")
    assert recipe(str(path)) == {"data": {}, "model": {}, "callbacks": []}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "mine.yaml contains a list: a recipe is a mapping with data, model, callbacks"),
        ("modell: {}", "mine.yaml contains 'modell': a recipe has only data, model, callbacks"),
        ("trainer: {}\nseed: 1", "mine.yaml contains 'trainer', 'seed': a recipe has"),
        ("data: [1]", "data of .*mine.yaml is a list: pass a mapping of arguments"),
        ("callbacks: {}\nmodel: 3", "model of .*mine.yaml is a int: pass a mapping"),
        ("callbacks: [OnlineKNN]", "callbacks of .*mine.yaml is not a list of mappings with class_path and init_args"),
        ("a: [", "mine.yaml cannot be read as YAML: while parsing"),
        (
            "!!python/object/apply:os.system [echo]",
            "cannot be read as YAML: could not determine a constructor",
        ),
    ],
)
def test_a_file_of_another_layout_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        recipe(str(tmp_path / "mine.yaml"))


def test_an_unknown_recipe_gets_the_nearest_suggested() -> None:
    with pytest.raises(ValueError, match="recipe 'papre' is unknown: did you mean 'paper'"):
        recipe("papre")
    with pytest.raises(ValueError, match=r"recipe 'zzz' is unknown: there are paper, mlssl, or pass a file"):
        recipe("zzz")
    with pytest.raises(FileNotFoundError, match=r"no file 'nowhere\.yaml': pass the YAML file of a recipe, or one of"):
        recipe("nowhere.yaml")
