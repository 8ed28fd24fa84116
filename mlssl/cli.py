"""The `mlssl` command. Each small command is a typed function; the Trainer's commands use LightningCLI.

Signatures are in files that import neither torch nor Lightning, and a command's file is loaded on demand, so that help
is printed at once.
"""

from __future__ import annotations

import difflib
import errno
import io
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from jsonargparse import ArgumentError

import mlssl
from mlssl.commands.parsing import COMMANDS, bound_yaml, call_command
from mlssl.commands.quiet import quiet
from mlssl.commands.trainer_help import TRAINER_HELP

if TYPE_CHECKING:
    from lightning import LightningDataModule, LightningModule

USAGE = """usage: mlssl COMMAND [ARGUMENTS]

  demo        pre-train on drawn scenes for a few minutes
  fit         pre-train:               mlssl fit --config run.yaml
  validate    features and probe of a checkpoint on the val set
  test        the same on the test set
  report      a page about a run:      mlssl report runs/fit-20250101-120000
  linear      linear probe:            mlssl linear last.ckpt resnet18
  knn         kNN classification:      mlssl knn last.ckpt resnet18
  predict     features of images:      mlssl predict last.ckpt FOLDER
  tag         labels of images:        mlssl tag tagger.safetensors FOLDER
  views       draw an image's views:   mlssl views photo.jpg -o grid.png
  neighbors   most similar images:     mlssl neighbors photo.jpg FOLDER
  export      the backbone only:       mlssl export last.ckpt -o out.safetensors
  pack        images to few archives:  mlssl pack FOLDER --dataset coco -o SHARDS
  completion  shell completion:        eval "$(mlssl completion bash)"

mlssl COMMAND --help lists the arguments of a command.
mlssl COMMAND ... --traceback shows where an error was raised, --verbose the
messages of Lightning, torch and other packages.
Exit codes: 0 success, 1 a bug in mlssl, 2 wrong input (one line of error),
130 interrupted by Ctrl-C."""

INTERRUPTED = 130
"""Exit code of a process ended by SIGINT, by the shells' convention: 128 + 2."""


def main(
    argv: Sequence[str] | None = None,
    *,
    model: type[LightningModule] | None = None,
    data: type[LightningDataModule] | None = None,
) -> int:
    """Run one command.

    The command for a custom class is a script of three lines::

        from my_package import MyModule
        from mlssl.cli import main
        sys.exit(main(model=MyModule))

    Args:
        argv: Words after `mlssl`; those of the process by default.
        model: Class that fit, validate and test build; by default that of ``--model``, of the resumed run or
            of ``--config``, else `mlssl.MultiLabelSSLModule`, which is imported only then.
        data: Likewise, ``--data`` and `mlssl.MultiLabelDataModule`.

    Returns:
        Exit code: 0, 2 for wrong input, or 130 if the user interrupted.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may contain any bytes
    words = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in words
    verbose = "--verbose" in words
    words = [word for word in words if word not in ("--traceback", "--verbose")]
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if words[0] == "--version":
        print(mlssl.__version__)
        return 0
    # A program that passes its own words has set up logging itself.
    screen = quiet(verbose) if argv is None else nullcontext()
    bound_yaml()
    try:
        with screen:
            _call(words, model, data)
    except KeyboardInterrupt as interrupt:
        print(f"mlssl: interrupted{f'; {interrupt}' if str(interrupt) else ''}", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError, ArgumentError) as error:
        if traceback or (isinstance(error, RuntimeError) and not _is_worker_failure(error)):
            raise
        print(f"mlssl: error: {_last_line(error)}", file=sys.stderr)
        return 2
    return 0


def _call(words: list[str], model: type[LightningModule] | None, data: type[LightningDataModule] | None) -> None:
    if words[0] in TRAINER_HELP:
        _call_trainer(words, model, data)
    elif words[0] in COMMANDS:
        call_command(words[0], words[1:])
    else:
        near = difflib.get_close_matches(words[0], [*TRAINER_HELP, *COMMANDS], n=1)
        meant = f", did you mean {near[0]!r}?" if near else ":"
        raise ValueError(f"there is no command {words[0]!r}{meant} mlssl --help lists them")


def _call_trainer(
    words: list[str], model: type[LightningModule] | None, data: type[LightningDataModule] | None
) -> None:
    if {"-h", "--help"} & set(words[1:]):
        print(TRAINER_HELP[words[0]])
        return
    from mlssl.commands.run import RunCLI

    RunCLI(["--help" if word == "--help_all" else word for word in words], model, data)


def _is_worker_failure(error: RuntimeError) -> bool:
    from mlssl.data.loader import is_worker_failure

    return is_worker_failure(error)


def _last_line(error: Exception) -> str:
    """The error message, also if a loader worker sent a whole traceback."""
    if isinstance(error, FileNotFoundError) and error.strerror == os.strerror(errno.ENOENT):  # raised by the system
        return f"there is no file or folder {error.filename!r}: check the path"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if lines[0].startswith("Caught ") else " ".join(line.strip() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
