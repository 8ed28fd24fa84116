"""`mlssl completion`: what a shell needs to complete the words of `mlssl`."""

from __future__ import annotations

import inspect
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import lightning as L

from mlssl.commands.run import TRAINER_COMMANDS, TRAINER_HELP
from mlssl.data.datamodule import MultiLabelDataModule
from mlssl.module import MultiLabelSSLModule

Shell = Literal["bash", "zsh", "tcsh"]

_PARTS = {"trainer": L.Trainer, "model": MultiLabelSSLModule, "data": MultiLabelDataModule}
_FILES = frozenset({"config", "ckpt_path", "sources", "backbone"})
_FOLDERS = frozenset({"runs", "root", "run", "folder", "resume"})


def completion_script(shell: Shell, commands: Mapping[str, Callable[..., None]]) -> str:
    """A script that teaches a shell the commands, their options and the choices of these.

    Args:
        shell: Whose language it is in.
        commands: Name → function, beside those of the Trainer.
    """
    import shtab

    parser = ArgumentParser(prog="mlssl")
    parser.add_argument("--version", action="store_true")
    chosen = parser.add_subparsers()
    for name, function in commands.items():
        # shtab passes over a command without help.
        command = chosen.add_parser(name, help=(function.__doc__ or name).partition("\n")[0])
        _add(command, _arguments(function), positional=True)
    for name in TRAINER_COMMANDS:
        command = chosen.add_parser(name, help=TRAINER_HELP[name].splitlines()[2])
        _add(command, dict.fromkeys(("config", "name", "runs", "seed_everything", "ckpt_path"), (Any, None)))
        command.add_argument("--print_config", action="store_true")
        command.add_argument("--help_all", action="store_true")
        for part, kind in _PARTS.items():
            _add(command, {f"{part}.{word}": argument for word, argument in _arguments(kind).items()})
    script: str = shtab.complete(parser, shell)
    return script


_Arguments = dict[str, tuple[Any, Any]]
"""Name → type and default, `inspect.Parameter.empty` where there is none."""


def _arguments(function: Callable[..., Any]) -> _Arguments:
    try:
        hints = get_type_hints(vars(function).get("__init__", function))
    except NameError:  # Lightning's Trainer has types that are imported for a type checker alone
        hints = {}
    return {
        name: (hints.get(name, Any), parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
    }


def _add(parser: ArgumentParser, arguments: _Arguments, *, positional: bool = False) -> None:
    import shtab

    for name, (kind, default) in arguments.items():
        required = positional and default is inspect.Parameter.empty
        short = ["-o"] if name == "output" else []
        settings: dict[str, Any] = {"choices": choices} if (choices := _choices(kind)) else {}
        action = (
            parser.add_argument(name, **settings) if required else parser.add_argument(*short, f"--{name}", **settings)
        )
        word = name.rpartition(".")[2]
        if word in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif word in _FILES or kind is Path or Path in get_args(kind):
            action.complete = shtab.FILE  # type: ignore[attr-defined]


def _choices(kind: Any) -> list[str]:
    """The words of a Literal, alone or in a union; of a bool, true and false."""
    if kind is bool:
        return ["true", "false"]
    parts = [kind] if get_origin(kind) is Literal else [part for part in get_args(kind) if get_origin(part) is Literal]
    return [str(word) for part in parts for word in get_args(part)]
