"""Accepted branches: presets, numbers, import paths and objects, and their plain form."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mlssl.views.blocks import BlockViews
from mlssl.views.branches import plain_branches, resolve_branches
from mlssl.views.recipe import PRESETS, Recipe

MODULE = """
import numpy as np
from mlssl.views.recipe import Recipe

def branch(block, generator):
    return np.full((3, 16, 16), 7, np.uint8)

class Brighter:
    def __init__(self, by=1):
        self.by = by

    def __call__(self, block, generator):
        return np.full((3, 16, 16), self.by, np.uint8)

soft = Recipe(hue=0.01)
number = 3
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A custom module on the Python path; returns its name."""
    (tmp_path / "their_package.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "their_package", raising=False)
    return "their_package"


def test_a_preset_is_its_recipes() -> None:
    for name, recipes in PRESETS.items():
        assert resolve_branches(name) == recipes
        assert len(recipes) == 2


def test_what_the_presets_change() -> None:
    for one, soft, gray, overhead in zip(*PRESETS.values(), strict=True):
        assert (soft.solarize_probability, soft.hue, soft.gray_probability) == (0, 0.05, 0.1)
        colours = (gray.saturation, gray.hue, gray.gray_probability, gray.solarize_probability)
        assert colours == (0, 0, 0, 0)
        assert overhead.flip_probability == overhead.vertical_flip_probability == 0.5
        assert overhead.turn_probability > 0
        assert (overhead.solarize_probability, overhead.hue) == (0, 0.05)
        for other in (soft, gray, overhead):
            assert (other.crop_area, other.blur_probability) == (one.crop_area, one.blur_probability)


def test_every_kind_of_plain_setting_is_resolved(package: str) -> None:
    text = "[{hue: 0.05, crop_area: [0.3, 1]}, {class_path: their_package.Brighter, init_args: {by: 9}}, "
    text += "their_package.branch, their_package.soft, {class_path: their_package.Brighter}]"
    settings = yaml.safe_load(text)
    grid = BlockViews(16, branches=settings)
    assert grid.branches[0] == Recipe(hue=0.05, crop_area=(0.3, 1))
    assert grid.branches[3] == Recipe(hue=0.01)
    views = grid(np.zeros((20, 30, 3), np.uint8), np.random.default_rng(0))
    assert [int(views[a].max()) for a in (1, 2, 4)] == [9, 7, 1]
    assert pickle.loads(pickle.dumps(grid)).num_branches == 5


def test_the_plain_form_stores_numbers_and_names_that_are_never_imported(package: str) -> None:
    from their_package import Brighter, branch

    given = [Recipe(hue=0.05), {"crop_area": (0.3, 1)}, branch, Brighter(2), f"{package}.branch"]
    given += [{"class_path": f"{package}.Brighter", "init_args": {"by": 3}}, "x-ray.yaml"]
    plain = plain_branches(given)
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert resolve_branches(plain[:2]) == (Recipe(hue=0.05), Recipe(crop_area=(0.3, 1)))
    custom = [f"custom {package}.{name}" for name in ("branch", "Brighter", "branch", "Brighter")]
    assert plain[2:] == [*custom, "x-ray.yaml"]
    assert plain_branches(plain) == plain
    assert plain_branches("soft") == "soft"
    for index in range(2, 6):
        with pytest.raises(
            ValueError,
            match=f"branch 1 is '{plain[index]}', the name of a function .* pass the function or object again",
        ):
            resolve_branches([Recipe(), plain[index]])
    with pytest.raises(ValueError, match="branches is 'custom mine', the name of a function"):
        resolve_branches("custom mine")


@pytest.mark.parametrize(
    ("branches", "error", "said"),
    [
        (
            "sofd",
            ValueError,
            "there is no preset of branches 'sofd', did you mean 'soft'\\?: pass one of paper, soft, gray",
        ),
        ("xray.yaml", ValueError, "there is no preset of branches 'xray.yaml': pass one of .*, or a list"),
        ([], ValueError, "got an empty list of branches, expected at least one"),
        ({"hue": 0.1}, TypeError, "got branches of type dict: pass branches='paper' or a list"),
        (3, TypeError, "got branches of type int: pass branches='paper' or a list"),
        (
            [{"blur_probabilty": 1}],
            ValueError,
            "the Recipe of branch 0 has no 'blur_probabilty', did you mean 'blur_prob",
        ),
        ([{"hue": 2}], ValueError, "got hue=2, expected a number from 0 to 0.5"),
        ([{"hue": "much"}], ValueError, "got hue=much, expected a number from 0 to 0.5"),
        ([{"crop_area": 0.5}], ValueError, "got crop_area=0.5, expected two numbers, the smaller first"),
        ([{"crop_area": [0.1, 0.5, 1]}], ValueError, "expected two numbers"),
        (
            ["soft"],
            ValueError,
            "branch 0 is 'soft', expected an import path.*the preset 'soft' does not go into a list",
        ),
        (["nowhere.branch"], ValueError, "branch 0 is 'nowhere.branch', which cannot be imported .*PYTHONPATH"),
        (["json.nothing"], ValueError, "branch 0 is 'json.nothing', which cannot be imported"),
        (["json.JSONDecoder"], TypeError, "branch 0 is the class JSONDecoder: pass a Recipe"),
        (["their_package.number"], TypeError, "branch 0 is of type builtins.int: pass a Recipe"),
        (
            [Recipe(), None],
            TypeError,
            "branch 1 is of type builtins.NoneType: pass a Recipe, an albumentations pipeline",
        ),
        ([Recipe], TypeError, "branch 0 is the class Recipe: pass a Recipe"),
        (
            [{"class_path": "json.loads", "args": {}}],
            ValueError,
            "branch 0 has the key 'args' in addition to class_path",
        ),
        ([""], ValueError, "branch 0 is '', expected an import path"),
    ],
)
def test_invalid_branches_are_refused(branches: Any, error: type[Exception], said: str, package: str) -> None:
    with pytest.raises(error, match=said):
        resolve_branches(branches)
