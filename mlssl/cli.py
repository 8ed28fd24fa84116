"""The `mlssl` command: words to calls. Each small command is a typed function, the Trainer's are LightningCLI."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

import mlssl
from mlssl.commands.completion import Shell, completion_script
from mlssl.commands.demo import demo
from mlssl.commands.evaluate import knn, linear
from mlssl.commands.export import export
from mlssl.commands.neighbors import neighbors
from mlssl.commands.pack import pack
from mlssl.commands.report import report
from mlssl.commands.run import TRAINER_COMMANDS, TRAINER_HELP, RunCLI
from mlssl.commands.views import views
from mlssl.data.loader import is_of_workers

USAGE = """usage: mlssl COMMAND [ARGUMENTS]

  demo        pre-train on drawn scenes for a few minutes, and see what comes out
  fit         pre-train:                 mlssl fit --config run.yaml --data.root FOLDER
  validate    features and probe of a checkpoint on the val set
  test        the same on the test set
  predict     features of every image, written to the run's folder
  report      a page about a run:        mlssl report runs/fit-20250101-120000
  linear      linear probe:              mlssl linear last.ckpt resnet18 --dataset corel5k --root FOLDER
  knn         nearest images vote:       mlssl knn last.ckpt resnet18 --dataset corel5k --root FOLDER
  views       draw an image's views:     mlssl views photo.jpg -o grid.png
  neighbors   the most alike images:     mlssl neighbors photo.jpg FOLDER --backbone last.ckpt
  export      take the backbone away:    mlssl export last.ckpt -o backbone.safetensors --format timm
  pack        many images, few files:    mlssl pack datasets/coco --dataset coco -o coco-shards
  completion  for a shell:               eval "$(mlssl completion bash)"

mlssl COMMAND --help lists the arguments of a command; --traceback shows where an error was raised.
Exit codes: 0 done, 1 a fault of mlssl, 2 wrong input (said in one line), 130 interrupted by Ctrl-C."""

INTERRUPTED = 130
"""What shells give for a process that ended by SIGINT, 128 + 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after `mlssl`; those of the process by default.

    Returns:
        Exit code: 0, 2 where the input was wrong, or 130 where the user interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if words[0] == "--version":
        print(mlssl.__version__)
        return 0
    try:
        if words[0] in TRAINER_COMMANDS:
            _call_trainer(words)
        elif words[0] in _COMMANDS:
            _call(words[0], words[1:])
        else:
            raise ValueError(f"there is no command {words[0]!r}: mlssl --help lists them")
    except KeyboardInterrupt as interrupt:
        print(f"mlssl: interrupted{f'; {interrupt}' if str(interrupt) else ''}", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError, ArgumentError) as error:
        if traceback or (isinstance(error, RuntimeError) and not is_of_workers(error)):
            raise
        print(f"mlssl: error: {_last_line(error)}", file=sys.stderr)
        return 2
    return 0


def completion(shell: Shell) -> None:
    """Print a script that completes the words of `mlssl` in a shell.

    Example: eval "$(mlssl completion bash)"

    Args:
        shell: bash, zsh or tcsh.
    """
    print(completion_script(shell, _COMMANDS))


_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "report": report,
    "linear": linear,
    "knn": knn,
    "views": views,
    "neighbors": neighbors,
    "export": export,
    "pack": pack,
    "completion": completion,
}

# Arguments that the signature alone does not describe: several words in a row, and a short name.
_SPECIAL_ARGUMENTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "sources": (("sources",), {"nargs": "+", "type": str}),
    "output": (("-o", "--output"), {"type": Path}),
}


class _Help(DefaultHelpFormatter):  # type: ignore[misc]
    """Help that fits a screen: no types, which choices and defaults tell, and no defaults that say nothing."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=29, width=100)

    def _get_help_string(self, action: Any) -> str:
        text = str(action.help or "").replace("%", "%%")
        quiet = action.default in (None, "==SUPPRESS==") or not action.option_strings or action.nargs == 0
        return text if quiet else f"{text.rstrip('.')} (default: {action.default})"

    def _format_args(self, action: Any, default_metavar: str) -> str:
        text: str = super()._format_args(action, default_metavar)
        kept = action.nargs == 0 or not action.option_strings or text.startswith("{")
        return text if kept else "…"


def _call(name: str, words: list[str]) -> None:
    function = _COMMANDS[name]
    summary, example, about = _docstring(function)
    parameters = inspect.signature(function).parameters
    required = [one.name.upper() for one in parameters.values() if one.default is inspect.Parameter.empty]
    parser = ArgumentParser(
        prog=f"mlssl {name}",
        usage=" ".join([f"mlssl {name}", *required, "[OPTIONS]"]),
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
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=set(special))
    function(**parser.parse_args(words).as_dict())


def _call_trainer(words: list[str]) -> None:
    if {"-h", "--help"} & set(words[1:]):
        print(TRAINER_HELP[words[0]])
        return
    RunCLI(["--help" if word == "--help_all" else word for word in words])


def _docstring(function: Callable[..., None]) -> tuple[str, str, dict[str, str]]:
    """Summary, example and what each argument is."""
    text = inspect.getdoc(function) or ""
    example = re.search(r"^Example: (.*)$", text, re.MULTILINE)
    arguments = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)$", text.partition("Args:")[2], re.MULTILINE)
    about = {name: " ".join(description.split()) for name, description in arguments}
    return text.partition("\n\n")[0].replace("\n", " "), example[1] if example else "", about


def _last_line(error: Exception) -> str:
    """The sentence itself, also where a loader worker sent its whole traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if lines[0].startswith("Caught ") else " ".join(line.strip() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
