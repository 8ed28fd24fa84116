"""Small commands as typed functions: their parsers and their help, from signature and docstring.

A command's file is loaded only when the command runs, and imports torch and Lightning within its function, so that help
is printed at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from argparse import SUPPRESS
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, get_loader, set_loader
from yaml import YAMLError

from mlssl.data.set_options import COMMON, SplitOptions
from mlssl.safe_yaml import check_yaml_size

COMMANDS = ("demo", "report", "linear", "knn", "views", "neighbors", "predict", "tag", "export", "pack", "completion")
"""Each is a function in the module of the same name in `mlssl.commands`."""

RARE = frozenset(SplitOptions.__dataclass_fields__) - set(COMMON)
"""Options of data sets that `--help` only names and `--help_all` explains."""

HELP_ALL = "--help_all"

COLUMNS = 80
"""Terminal width that help has to fit."""


def bound_yaml() -> None:
    """Make jsonargparse refuse YAML that would expand too much, in every parser of this process."""
    load = get_loader("yaml")
    if getattr(load, "is_bounded", False):
        return

    def bounded(text: str) -> Any:
        try:
            check_yaml_size(text, "The YAML of an option")
        except ValueError as error:
            raise ArgumentError(
                None, str(error)
            ) from None  # jsonargparse does not mistake it for another kind of value
        return load(text)

    bounded.is_bounded = True  # type: ignore[attr-defined]
    set_loader("yaml", bounded, (YAMLError,))


def call_command(name: str, words: list[str]) -> None:
    """Run a small command with the words that follow it.

    Raises:
        ArgumentError: A word is not one of its arguments.
    """
    call_function(_function(name), words, f"mlssl {name}")


def call_function(function: Callable[..., None], words: list[str], prog: str) -> None:
    """Run a typed function with the words of its command line, as `mlssl` runs its small commands.

    The fields of a dataclass parameter, such as `SplitOptions`, become separate options: a script whose function takes
    `EvaluationOptions` reads the same data sets as `mlssl linear`, with the same options.

    Args:
        function: Its docstring has a summary, a line "Example: …" and a section "Args:".
        words: Words after the name of the command.
        prog: Name of the command, for help.

    Raises:
        ArgumentError: A word is not one of its arguments.
    """
    if HELP_ALL in words:
        function_parser(function, prog, all_options=True).print_help()
        return
    values: dict[str, Any] = function_parser(function, prog).parse_args(words).as_dict()
    own = inspect.signature(function).parameters
    for argument, kind in _option_groups(function).items():
        fields = [field.name for field in dataclasses.fields(kind) if field.name not in own]
        values[argument] = kind(**{name: values.pop(name) for name in fields})
    function(**values)


def command_parser(name: str, *, all_options: bool = False) -> ArgumentParser:
    """The parser of a small command; see :func:`function_parser`."""
    return function_parser(_function(name), f"mlssl {name}", all_options=all_options)


def function_parser(function: Callable[..., None], prog: str, *, all_options: bool = False) -> ArgumentParser:
    """The parser of a typed function, from its signature and docstring.

    Args:
        function: As for :func:`call_function`.
        prog: Likewise.
        all_options: Whether help explains all options of data sets; otherwise it only names the rare ones.
    """
    summary, example, about = _docstring(function)
    parameters = inspect.signature(function).parameters
    groups = _option_groups(function)
    required = [one for one in parameters if parameters[one].default is inspect.Parameter.empty and one not in groups]
    fields = [field.name for kind in groups.values() for field in dataclasses.fields(kind)]
    rare = [] if all_options else [field for field in fields if field in RARE]
    more = f"{HELP_ALL} explains more options of the images: {', '.join(f'--{option}' for option in rare)}"
    parser = ArgumentParser(
        prog=prog,
        usage=" ".join([prog, *map(str.upper, required), "[OPTIONS]"]),
        description=summary,
        epilog="\n".join(
            [*(textwrap.wrap(more, COLUMNS) if rare else ()), *([""] if rare else ()), f"Example: {example}"]
        ),
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
        parser.add_class_arguments(kind, as_group=False, skip={one for one in fields if one in parameters})
    for action in parser._actions:
        if action.dest in rare:
            action.help = SUPPRESS
    return parser


# Arguments that the signature alone does not describe: several words in a row, and a short name.
_SPECIAL_ARGUMENTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "sources": (("sources",), {"nargs": "+", "type": str}),
    "folders": (("folders",), {"nargs": "+", "type": Path}),
    "output": (("-o", "--output"), {"type": Path}),
}


class _Help(DefaultHelpFormatter):  # type: ignore[misc]
    """Help that fits a screen: no types, which choices and defaults show, and no empty defaults."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join("\n".join(textwrap.wrap(line, width, initial_indent=indent)) for line in text.splitlines())

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
    """Summary, example, and the description of each argument."""
    text = inspect.getdoc(function) or ""
    example = re.search(r"^Example: (.*)$", text, re.MULTILINE)
    arguments = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)$", text.partition("Args:")[2], re.MULTILINE)
    about = {name: " ".join(description.split()) for name, description in arguments}
    return text.partition("\n\n")[0].replace("\n", " "), example[1] if example else "", about
