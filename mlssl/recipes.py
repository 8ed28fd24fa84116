"""Recipes: named sets of settings of data, model and callbacks, from a name or a YAML file."""

from __future__ import annotations

import copy
import difflib
from pathlib import Path
from typing import Any

from mlssl.safe_yaml import read_yaml

PARTS = ("data", "model", "callbacks")


def recipe(name: str) -> dict[str, Any]:
    """Settings of a recipe, without data set, root and backbone.

    ``paper`` is the method of arXiv 2506.23156 as in its code, which all defaults follow (γ = 0.2; the author's COCO
    run used 0.3).

    ``mlssl`` is the paper's loss with three changes: softer colours, Muon instead of SGD with half an epoch of warm-up,
    and γ = 0.3 (docs/which_recipe.md).

    Args:
        name: Name of a recipe, or a YAML file of the same layout with suffix .yaml or .yml.

    Returns:
        ``{"data": {...}, "model": {...}, "callbacks": [{"class_path": ..., "init_args": ...}, ...]}``: keyword
        arguments of `MultiLabelDataModule` and `MultiLabelSSLModule`, and callbacks as in YAML. A new one each time.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the name is unknown (suggests the nearest), or the file has another layout.

    Example:
        >>> recipe("paper")["model"]["contrastive_weight"]
        4.0
    """
    if name.endswith((".yaml", ".yml")):
        return _from_file(Path(name))
    if name not in _RECIPES:
        near = difflib.get_close_matches(name, _RECIPES, n=1)
        meant = f"did you mean {near[0]!r}? There" if near else "there"
        names = ", ".join(_RECIPES)
        raise ValueError(f"recipe {name!r} is unknown: {meant} are {names}, or pass a file that ends in .yaml.")
    return copy.deepcopy(_RECIPES[name])


def _from_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {str(path)!r}: pass the YAML file of a recipe, or one of {', '.join(_RECIPES)}."
        )
    settings = read_yaml(path) or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{path} contains a {type(settings).__name__}: a recipe is a mapping with {', '.join(PARTS)}.")
    unknown = [key for key in settings if key not in PARTS]
    if unknown:
        raise ValueError(f"{path} contains {', '.join(map(repr, unknown))}: a recipe has only {', '.join(PARTS)}.")
    found = {"data": settings.get("data") or {}, "model": settings.get("model") or {}}
    callbacks = settings.get("callbacks") or []
    for part, value in found.items():
        if not isinstance(value, dict):
            raise ValueError(f"{part} of {path} is a {type(value).__name__}: pass a mapping of arguments.")
    if not isinstance(callbacks, list) or not all(isinstance(one, dict) and "class_path" in one for one in callbacks):
        raise ValueError(f"callbacks of {path} is not a list of mappings with class_path and init_args.")
    return {**found, "callbacks": callbacks}


_RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        "data": {"size": 224, "rows": 2, "cols": 2, "overlap": 0.2, "branches": "paper"},
        "model": {
            "projection_dim": 2048,
            "predictor_dim": 512,
            "temperature": 0.3,
            "base_temperature": 0.07,
            "contrastive_weight": 4.0,
            "stop_gradient": False,
            "branches_together": False,
            "form": "log_of_sum",
            "positives": "same_image",
            "optimizer": "sgd",
            "base_lr": 0.05,
            "weight_decay": 1e-4,
            "decay_norm_and_bias": True,
            "warmup_epochs": 0.0,
            "constant_predictor_lr": False,
        },
        "callbacks": [],
    },
}
_PAPER = _RECIPES["paper"]
_RECIPES["mlssl"] = {
    "data": {**_PAPER["data"], "overlap": 0.3, "branches": "soft"},
    "model": {
        **_PAPER["model"],
        "optimizer": "muon",
        "optimizer_kwargs": {"momentum": 0.95, "nesterov": True},  # momentum of Jordan et al.; the paper's SGD has 0.9
        "base_lr": 2e-3,
        "warmup_epochs": 0.5,
    },
    "callbacks": [],
}
