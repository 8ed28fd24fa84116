"""The `mlssl` command: words to calls. Each small command is a typed function, the Trainer's are LightningCLI."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

import mlssl
from mlssl.commands.demo import demo
from mlssl.commands.evaluate import linear
from mlssl.commands.export import export
from mlssl.commands.run import TRAINER_COMMANDS, RunCLI
from mlssl.commands.views import views

USAGE = """usage: mlssl COMMAND [ARGUMENTS]

  demo        pre-train on drawn scenes for a few minutes, and see what comes out
  fit         pre-train:                 mlssl fit --config run.yaml --data.root FOLDER
  validate    features and probe of a checkpoint on the val set
  test        the same on the test set
  predict     features of every image, written to the run's folder
  linear      linear probe:              mlssl linear last.ckpt resnet18 --dataset corel5k --root FOLDER
  views       draw an image's views:     mlssl views photo.jpg -o grid.png
  export      take the backbone away:    mlssl export last.ckpt -o backbone.safetensors --format timm

mlssl COMMAND --help lists the arguments of a command; --traceback shows where an error was raised.
Exit codes: 0 done, 1 interrupted or a fault of mlssl, 2 wrong input (said in one line)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after `mlssl`; those of the process by default.

    Returns:
        Exit code: 0, or 2 where the input was wrong.
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
            RunCLI(words)
        elif words[0] in _COMMANDS:
            _call(words[0], words[1:])
        else:
            raise ValueError(f"there is no command {words[0]!r}: mlssl --help lists them")
    except (ValueError, TypeError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        if traceback:
            raise
        print(f"mlssl: error: {_last_line(error)}", file=sys.stderr)
        return 2
    return 0


_COMMANDS: dict[str, Callable[..., None]] = {"demo": demo, "linear": linear, "views": views, "export": export}

# Arguments that the signature alone does not describe: several words in a row, and a short name.
_SPECIAL_ARGUMENTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "sources": (("sources",), {"nargs": "+", "type": str}),
    "output": (("-o", "--output"), {"type": Path}),
}


def _call(name: str, words: list[str]) -> None:
    function = _COMMANDS[name]
    parser = ArgumentParser(prog=f"mlssl {name}", description=(function.__doc__ or "").partition("\n\n")[0])
    parameters = inspect.signature(function).parameters
    special = parameters.keys() & _SPECIAL_ARGUMENTS.keys()
    for argument in special:
        flags, settings = _SPECIAL_ARGUMENTS[argument]
        default = parameters[argument].default
        parser.add_argument(*flags, **settings, **({} if default is inspect.Parameter.empty else {"default": default}))
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=set(special))
    function(**parser.parse_args(words).as_dict())


def _last_line(error: Exception) -> str:
    """The sentence itself, also where a loader worker sent its whole traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if lines[0].startswith("Caught ") else " ".join(lines)


if __name__ == "__main__":
    sys.exit(main())
