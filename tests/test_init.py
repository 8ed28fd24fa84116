"""The top level of the library: its names, each loaded when it is used."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import mlssl

CONTRACT = {
    *("MultiLabelSSLModule", "MultiLabelDataModule", "BlockViews", "Recipe", "recipe", "image_aware_contrastive_loss"),
    *("negative_cosine_similarity", "ImageAwareContrastiveLoss", "NegativeCosineSimilarity", "export_backbone"),
    *("Records", "Features", "extract_features", "linear_probe", "block_grid"),
}


def modules_after(statement: str) -> set[str]:
    """Top-level modules of a new process after a statement."""
    program = f"import json, sys\n{statement}\nprint(json.dumps([one.partition('.')[0] for one in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_every_public_name_exists() -> None:
    assert set(dir(mlssl)) >= {*CONTRACT, "__version__"}
    for name in CONTRACT:
        found = getattr(mlssl, name)
        assert found.__name__ == name
        assert found.__module__.startswith("mlssl.")


def test_type_checkers_see_the_names_that_are_loaded() -> None:
    tree = ast.parse(Path(mlssl.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {one.names[0].name: one.module for one in block.body if isinstance(one, ast.ImportFrom)}
    assert seen == mlssl._MODULES


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'mlssl' has no attribute 'Nothing'"):
        mlssl.Nothing  # noqa: B018


def test_a_name_is_loaded_when_it_is_used() -> None:
    heavy = {"torch", "lightning", "timm", "torchvision", "numpy", "cv2"}
    assert not modules_after("import mlssl; mlssl.__version__; dir(mlssl)") & heavy
    assert not modules_after("from mlssl import recipe, block_grid") & heavy
    assert "torch" in modules_after("from mlssl import image_aware_contrastive_loss")
    assert "lightning" not in modules_after("from mlssl import image_aware_contrastive_loss")
