"""What the commands need of LightningCLI and has no public name there: this file alone uses its private ones."""

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
        """Lightning's commands but predict, which is a command of the library's own."""
        commands = LightningCLI.subcommands()
        del commands["predict"]
        return commands

    @property
    def command_parsers(self) -> dict[str, LightningArgumentParser]:
        """The parser of each command."""
        return self._subcommand_parsers

    @property
    def command_parser(self) -> LightningArgumentParser:
        """That of the command which was given."""
        return self._parser(self.config.subcommand)

    @property
    def settings(self) -> Namespace:
        """Of the command, as they were parsed; what is changed here is what is built and saved."""
        return self.config[self.config.subcommand]

    def built(self, name: str, default: Any = None) -> Any:
        """A setting of the command after its classes were built."""
        return self._get(self.config_init, name, default)

    def read_checkpoint(self) -> None:
        """Take what the settings need from ``settings.ckpt_path``; called once they are parsed."""

    def _parse_ckpt_path(self) -> None:
        # Lightning's own imports what a checkpoint names, and prefers its values to those that were given.
        self.read_checkpoint()


def is_of_restoring(error: BaseException) -> bool:
    """Whether it was raised while Lightning read a checkpoint or gave its states back."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == _RESTORING for frame, _ in frames)
