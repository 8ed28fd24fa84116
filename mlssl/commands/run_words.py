"""Read the classes, configs, recipe and resumed run from the words of `mlssl fit`, `validate` and `test`."""

from __future__ import annotations

import json
from argparse import ArgumentError, ArgumentParser
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from lightning import LightningDataModule, LightningModule

from mlssl.commands.custom_code import import_object, import_path
from mlssl.commands.saved_config import name_of_class
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.module import MultiLabelSSLModule
from mlssl.recipes import recipe
from mlssl.run_folder import checked_config, resumable_run
from mlssl.safe_yaml import parse_yaml, read_yaml

_VALUES = {
    "--resume": "the folder of a run, --resume runs/NAME-<time>",
    "--config": "a YAML file, --config run.yaml",
    "--recipe": "a recipe, --recipe paper, or a YAML file",
    "--model": "a class, --model my_package.MyModule",
    "--data": "a class, --data my_package.MyData",
}


_Configs: TypeAlias = list[tuple[str, dict[str, Any]]]
"""Path and content of each config file."""


class RunWords(NamedTuple):
    """Classes, settings and folder of a run."""

    words: list[str]
    """For LightningCLI: those of the recipe, of the configs, then the others; later words override earlier ones."""
    model: type[LightningModule]
    data: type[LightningDataModule]
    callbacks: list[dict[str, Any]]
    """Callbacks of the recipe."""
    folder: Path | None
    """Folder of the run to resume; None for a new run."""
    checkpoint: Path | None
    """Last checkpoint of the run to resume; None for a new run."""


def read_words(
    words: list[str],
    model: type[LightningModule] | None = None,
    data: type[LightningDataModule] | None = None,
) -> RunWords:
    """Read what the parser needs, and add the words of recipe and configs.

    Args:
        words: Words after `mlssl`; the first is the command.
        model: Class that the command is for; None: the one named by words or config.
        data: Likewise.

    Raises:
        ValueError: On conflicting words, configs that cannot be read, and classes that cannot be imported or differ.
        FileNotFoundError: If the run to resume, or the file of a recipe, does not exist.
    """
    command, *others = ["--data.check_images=true" if word == "--check-images" else word for word in words]
    parser = ArgumentParser(exit_on_error=False, add_help=False, allow_abbrev=False)
    for option in _VALUES:
        if option != "--config":
            parser.add_argument(option)
    parser.add_argument("-c", "--config", action="append", default=[])
    try:
        given, others = parser.parse_known_args(others)
    except ArgumentError as error:
        option = str(error.argument_name).rpartition("/")[2]
        raise ValueError(f"{option} was given without a value: pass {_VALUES[option]}.") from None
    configs, folder, checkpoint = list(given.config), None, None
    if given.resume is not None:
        _check_resume(command, given.recipe, others)
        folder = Path(given.resume)
        config, checkpoint = resumable_run(folder)
        checked_config(config)
        configs.insert(0, str(config))
    contents = [(path, _config_content(path)) for path in configs]
    name = given.recipe or next((content["recipe"] for _, content in reversed(contents) if content.get("recipe")), None)
    # A resumed run has the settings of its recipe in its config.
    settings = recipe(str(name)) if name is not None and folder is None else {}
    callbacks = settings.pop("callbacks", [])
    classes = {
        "model": _find_class("model", MultiLabelSSLModule, model, given.model, contents),
        "data": _find_class("data", MultiLabelDataModule, data, given.data, contents),
    }
    all_words = [command]
    for config in [*([json.dumps(settings)] if settings else []), *configs]:
        all_words += ["--config", config]
    all_words += others
    all_words += [] if name is None else ["--recipe", str(name)]
    for part, kind in classes.items():
        all_words += [f"--{part}_class", import_path(kind)]
    return RunWords(all_words, classes["model"], classes["data"], callbacks, folder, checkpoint)


def words_of_callbacks(of_recipe: list[dict[str, Any]], given: Any) -> list[str]:
    """Callbacks of a recipe as words, except those of a class that the user gave.

    Args:
        of_recipe: Callbacks of the recipe, each with its ``class_path``.
        given: One callback of the user as the parser stores it, a list of them, or None.
    """
    given = given or []
    names = {name_of_class(one) for one in (given if isinstance(given, list) else [given])}
    missing = [one for one in of_recipe if name_of_class(one) not in names]
    return [f"--trainer.callbacks+={json.dumps(one)}" for one in missing]


def _check_resume(command: str, recipe_name: str | None, others: list[str]) -> None:
    if command != "fit":
        raise ValueError(f"--resume is for fit, but {command} was given: pass --ckpt_path CHECKPOINT.")
    if any(word.partition("=")[0] == "--start_from" for word in others):
        raise ValueError("--start_from starts a new run, --resume continues one: pass one of them.")
    if recipe_name is not None:
        raise ValueError("--recipe is for a new run, --resume keeps the settings of its run: leave one of them out.")


def _config_content(config: str) -> dict[str, Any]:
    """Content of a config, a file or YAML text; empty if the parser will refuse it."""
    try:
        is_file = Path(config).is_file()
    except (OSError, ValueError):  # too long for a name, or with a NUL
        is_file = False
    content = read_yaml(Path(config)) if is_file else parse_yaml(config, "--config")
    return content if isinstance(content, dict) else {}


def _find_class(part: str, default: type, own: type | None, named: str | None, contents: _Configs) -> Any:
    """The class given by the command, an option or a config; if several give one, it must be the same."""
    base = LightningModule if part == "model" else LightningDataModule
    wanted: list[tuple[str, str, type]] = []
    if own is not None:
        wanted.append(("this command", import_path(own), own))
    paths = [(f"--{part}", named), *((path, content.get(f"{part}_class")) for path, content in reversed(contents))]
    for where, path in paths:
        if path is None or any(path == other for _, other, _ in wanted):
            continue
        found = import_object(str(path), where)
        if not (isinstance(found, type) and issubclass(found, base)):
            raise ValueError(f"{where} names {path}, which is not a {base.__name__}: pass a subclass of it.")
        wanted.append((where, import_path(found), found))
    for where, path, found in wanted[1:]:
        first, first_path, first_class = wanted[0]
        if found is not first_class and path != first_path:
            raise ValueError(
                f"{first} is for the class {first_path}, but {where} is for {path}: pass one, or start a new run."
            )
    return wanted[0][2] if wanted else default
