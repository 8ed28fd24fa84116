"""Private parts of LightningCLI that the commands need: no other file uses them."""

from __future__ import annotations

import traceback
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

_RESTORING = "lightning.pytorch.trainer.connectors.checkpoint_connector"


class OpenCLI(LightningCLI):
    """LightningCLI with public names for its parsers and settings, and for how it reads a checkpoint."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's commands except predict, which mlssl replaces."""
        commands = LightningCLI.subcommands()
        del commands["predict"]
        return commands

    @property
    def command_parsers(self) -> dict[str, LightningArgumentParser]:
        """The parser of each command."""
        return self._subcommand_parsers

    @property
    def command_parser(self) -> LightningArgumentParser:
        """The parser of the given command."""
        return self._parser(self.config.subcommand)

    @property
    def settings(self) -> Namespace:
        """Parsed settings of the command; changes to them affect what is built and saved."""
        return self.config[self.config.subcommand]

    def built(self, name: str, default: Any = None) -> Any:
        """A setting of the command after its classes were built."""
        return self._get(self.config_init, name, default)

    def read_checkpoint(self) -> None:
        """Take what the settings need from ``settings.ckpt_path``; called once they are parsed."""

    def _parse_ckpt_path(self) -> None:
        # Lightning's method imports what a checkpoint names, and its values override those that were given.
        self.read_checkpoint()


def is_restore_error(error: BaseException) -> bool:
    """Whether the error was raised while Lightning read a checkpoint or restored its state."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == _RESTORING for frame, _ in frames)
