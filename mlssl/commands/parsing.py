"""Small commands as typed functions: their parsers and their help, from signature and docstring.

A command's file is loaded when it is asked for, and imports torch and Lightning within its function, so that help comes
at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter

COMMANDS = ("demo", "report", "linear", "knn", "views", "neighbors", "export", "pack", "completion")
"""Each is the function of its name in the module of its name in `mlssl.commands`."""

COLUMNS = 80
"""Width of a terminal that help has to fit."""


def call_command(name: str, words: list[str]) -> None:
    """Run a small command with the words that follow it.

    Raises:
        ArgumentError: On words that are no arguments of it.
    """
    function = _function(name)
    values: dict[str, Any] = command_parser(name).parse_args(words).as_dict()
    for argument, kind in _option_groups(function).items():
        values[argument] = kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})
    function(**values)


def command_parser(name: str) -> ArgumentParser:
    """The parser of a small command, from its function's signature and docstring."""
    function = _function(name)
    summary, example, about = _docstring(function)
    parameters = inspect.signature(function).parameters
    groups = _option_groups(function)
    required = [one for one in parameters if parameters[one].default is inspect.Parameter.empty and one not in groups]
    parser = ArgumentParser(
        prog=f"mlssl {name}",
        usage=" ".join([f"mlssl {name}", *map(str.upper, required), "[OPTIONS]"]),
        description=summary,
        epilog=f"Example: {example}",
        formatter_class=_Help,
        exit_on_error=False,
    )
    special = parameters.keys() & _SPECIAL_ARGUMENTS.keys()
    for argument in sorted(special):
        flags, settings = _SPECIAL_ARGUMENTS[argument]
        default = parameters[argument].default
        given = {} if default is inspect.Parameter.empty else {"default": default}
        parser.add_argument(*flags, **settings, **given, help=about.get(argument))
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip={*special, *groups})
    for kind in groups.values():
        parser.add_class_arguments(kind, as_group=False)
    return parser


# Arguments that the signature alone does not describe: several words in a row, and a short name.
_SPECIAL_ARGUMENTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "sources": (("sources",), {"nargs": "+", "type": str}),
    "folders": (("folders",), {"nargs": "+", "type": Path}),
    "output": (("-o", "--output"), {"type": Path}),
}


class _Help(DefaultHelpFormatter):  # type: ignore[misc]
    """Help that fits a screen: no types, which choices and defaults tell, and no defaults that say nothing."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=29, width=COLUMNS)

    def _get_help_string(self, action: Any) -> str:
        text = str(action.help or "").replace("%", "%%")
        quiet = action.default in (None, "==SUPPRESS==") or not action.option_strings or action.nargs == 0
        return text if quiet else f"{text.rstrip('.')} (default: {action.default})"

    def _format_args(self, action: Any, default_metavar: str) -> str:
        text: str = super()._format_args(action, default_metavar)
        kept = action.nargs == 0 or not action.option_strings or text.startswith("{")
        return text if kept else "…"


def _function(name: str) -> Callable[..., None]:
    function: Callable[..., None] = getattr(import_module(f"mlssl.commands.{name}"), name)
    return function


def _option_groups(function: Callable[..., None]) -> dict[str, Any]:
    """Parameters that are dataclasses: options that several commands share."""
    return {name: kind for name, kind in get_type_hints(function).items() if dataclasses.is_dataclass(kind)}


def _docstring(function: Callable[..., None]) -> tuple[str, str, dict[str, str]]:
    """Summary, example and what each argument is."""
    text = inspect.getdoc(function) or ""
    example = re.search(r"^Example: (.*)$", text, re.MULTILINE)
    arguments = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)$", text.partition("Args:")[2], re.MULTILINE)
    about = {name: " ".join(description.split()) for name, description in arguments}
    return text.partition("\n\n")[0].replace("\n", " "), example[1] if example else "", about
