"""Augmentation branches: resolve user settings to objects, and objects to plain settings."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mlssl.views.recipe import PRESETS, Recipe

Block: TypeAlias = npt.NDArray[np.uint8]

Branch: TypeAlias = Recipe | Callable[[Block, np.random.Generator], Any]
"""A `Recipe`, or a function of a block, uint8 (H, W, C), and a generator. It returns uint8 (C, S, S), an array or
tensor, or a pair of that and the view's box: top, left, height and width as fractions of the block."""

BranchSetting: TypeAlias = Any
"""A branch, an albumentations pipeline, a mapping of a Recipe's numbers, {class_path, init_args}, or a string: a .yaml
file of an albumentations pipeline, or else the import path of a branch."""

CUSTOM = "custom "
"""Prefix of the text that represents a custom function or object in hyper-parameters; never imported."""


def resolve_branches(branches: str | Sequence[BranchSetting]) -> tuple[Branch, ...]:
    """Resolve a preset or a list of settings to A ≥ 1 branches.

    Raises:
        ValueError: The preset is unknown, the list is empty, or a setting is not a branch.
        TypeError: `branches` is neither a name nor a list.
    """
    remedy = "pass branches='paper' or a list of branches"
    if isinstance(branches, str):
        if branches.startswith(CUSTOM):
            raise ValueError(_pass_again(branches, "branches"))
        if branches not in PRESETS:
            raise ValueError(
                f"there is no preset of branches {branches!r}{_nearest(branches, PRESETS)}: pass one of "
                f"{', '.join(PRESETS)}, or a list, such as [{{hue: 0.05}}, {{hue: 0.1}}] for two branches"
            )
        return PRESETS[branches]
    if isinstance(branches, Mapping) or not isinstance(branches, Iterable):
        raise TypeError(f"got branches of type {type(branches).__name__}: {remedy}, even for a single branch")
    resolved = tuple(resolve_branch(one, f"branch {index}") for index, one in enumerate(branches))
    if not resolved:
        raise ValueError(f"got an empty list of branches, expected at least one: {remedy}")
    return resolved


def resolve_branch(setting: BranchSetting, name: str) -> Branch:
    """Resolve a setting to a branch; `name` is its name in errors.

    Raises:
        ValueError: The setting misspells a number or a path, or cannot be imported or read.
        TypeError: It cannot be a branch.
    """
    if isinstance(setting, Recipe):
        return setting
    if isinstance(setting, str) and setting.endswith((".yaml", ".yml")) and not setting.startswith(CUSTOM):
        from mlssl.views.albumentations_branch import read_pipeline

        return read_pipeline(setting, name)
    if isinstance(setting, (str, Mapping)):
        if isinstance(setting, Mapping) and "class_path" not in setting:
            return _recipe(setting, name)
        return resolve_branch(resolve_object(setting, name), name)
    if any(one.__module__.partition(".")[0] == "albumentations" for one in type(setting).__mro__):
        from mlssl.views.albumentations_branch import AlbumentationsBranch

        return AlbumentationsBranch(setting, name)
    if not callable(setting) or isinstance(setting, type):
        given = f"the class {setting.__qualname__}" if isinstance(setting, type) else f"of type {_path(setting)}"
        raise TypeError(
            f"{name} is {given}: pass a Recipe, an albumentations pipeline, or a function of block and generator; "
            "in YAML, write {class_path: my_package.MyBranch, init_args: {}} for an object of a class"
        )
    branch: Branch = setting
    return branch


def resolve_object(setting: str | Mapping[str, Any], name: str) -> Any:
    """Import the object that a string names, or build it from {class_path, init_args}.

    Raises:
        ValueError: The name does not exist, or the mapping has other keys.
    """
    if isinstance(setting, str):
        if setting.startswith(CUSTOM):
            raise ValueError(_pass_again(setting, name))
        return _imported(setting, name)
    unknown = [str(key) for key in setting if key not in ("class_path", "init_args")]
    if unknown:
        raise ValueError(
            f"{name} has the key {unknown[0]!r} in addition to class_path: pass only class_path and init_args"
        )
    return _imported(str(setting["class_path"]), name)(**(setting.get("init_args") or {}))


def check_keys(given: Mapping[str, Any], known: Iterable[str], name: str) -> None:
    """Raise ValueError for an unknown key, and suggest the nearest one."""
    for key in given:
        if key not in known:
            raise ValueError(f"{name} has no {key!r}{_nearest(str(key), known)}: it takes {', '.join(known)}")


def plain_branches(branches: str | Sequence[BranchSetting]) -> str | list[Any]:
    """The same settings as plain values, for hyper-parameters and reports; see `plain_branch`."""
    return branches if isinstance(branches, str) else [plain_branch(one) for one in branches]


def plain_branch(setting: BranchSetting) -> Any:
    """A Recipe as a mapping of its numbers, a file as its path, anything else as text that is never imported."""
    if isinstance(setting, Recipe):
        setting = asdict(setting)
    if isinstance(setting, Mapping):
        if "class_path" in setting:
            return CUSTOM + str(setting["class_path"])
        return {name: list(value) if isinstance(value, tuple) else value for name, value in setting.items()}
    if isinstance(setting, str):
        return setting if setting.endswith((".yaml", ".yml")) or setting.startswith(CUSTOM) else CUSTOM + setting
    return CUSTOM + _path(setting)


def branch_name(index: int, branch: Branch) -> str:
    """Name of a branch in errors."""
    return f"branch {index} ({_path(getattr(branch, 'pipeline', branch))})"


def _recipe(numbers: Mapping[str, Any], name: str) -> Recipe:
    check_keys(numbers, [field.name for field in fields(Recipe)], f"the Recipe of {name}")
    return Recipe(**numbers)


def _imported(path: str, name: str) -> Any:
    module, _, attribute = path.rpartition(".")
    if not module:
        preset = f" (the preset {path!r} does not go into a list: branches={path})" if path in PRESETS else ""
        raise ValueError(
            f"{name} is {path!r}, expected an import path, such as my_package.{path or 'branch'}, or a .yaml "
            f"file{preset}"
        )
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{name} is {path!r}, which cannot be imported ({error}): correct it, or put its folder on PYTHONPATH"
        ) from error


def _path(thing: object) -> str:
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def _nearest(given: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(given, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _pass_again(text: str, name: str) -> str:
    return (
        f"{name} is {text!r}, the name of a function or object, which hyper-parameters do not store: pass the function "
        "or object again"
    )
