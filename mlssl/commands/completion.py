"""`mlssl completion`: shell completion for `mlssl`."""

from __future__ import annotations

from typing import Literal

from mlssl.commands.parsing import COMMANDS
from mlssl.commands.trainer_help import TRAINER_HELP

_SCRIPT = """\
_mlssl() {
  local word="${COMP_WORDS[COMP_CWORD]}" words=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="COMMANDS"
  elif [ "${word#-}" != "$word" ]; then
    words="$(mlssl "${COMP_WORDS[1]}" --help | grep -oE -e '--?[A-Za-z_][A-Za-z0-9_.]*' | sort -u)"
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _mlssl mlssl
"""
"""Reads the options from the command's help, which takes a fraction of a second; values complete to file names."""


def completion(shell: Literal["bash", "zsh"]) -> None:
    """Print a script for the shell that completes commands and their options.

    Example: eval "$(mlssl completion bash)"

    Args:
        shell: bash or zsh.
    """
    if shell == "zsh":
        print("autoload -Uz bashcompinit && bashcompinit")
    print(_SCRIPT.replace("COMMANDS", " ".join([*TRAINER_HELP, *COMMANDS])), end="")
