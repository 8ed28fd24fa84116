"""LightningCLI's private names that one file uses: each exists and behaves as that file expects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser

from mlssl.commands.lightning_private import OpenCLI


class Data(L.LightningDataModule):
    """Nothing."""


class Model(L.LightningModule):
    """One setting."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.width = width


class Recorder(OpenCLI):
    """Records its calls, and trains nothing."""

    def read_checkpoint(self) -> None:
        """Called when the settings are parsed and nothing is built."""
        assert not hasattr(self, "config_init")
        self.read = self.settings.ckpt_path
        self.settings.model.width = 5

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse without Lightning's check of the process's words."""
        self.config = parser.parse_args(args)

    def fit(self, *_: Any, **__: Any) -> None:
        """Nothing."""


def recorder(*words: str) -> Recorder:
    return Recorder(Model, Data, save_config_callback=None, seed_everything_default=False, args=["fit", *words])


def test_there_is_a_parser_per_command_and_one_of_the_given_command() -> None:
    cli = recorder()
    assert cli.command_parsers.keys() == {"fit", "validate", "test"}
    assert all(isinstance(one, LightningArgumentParser) for one in cli.command_parsers.values())
    assert cli.command_parser is cli.command_parsers["fit"]


def test_get_returns_built_objects() -> None:
    cli = recorder("--trainer.max_epochs", "3")
    assert isinstance(cli.built("model"), Model)
    assert cli.built("nothing", 7) == 7
    assert cli.settings.trainer.max_epochs == 3


def test_parse_ckpt_path_reads_the_checkpoint_and_its_changes_are_built(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_text("what LightningCLI itself would fail at")
    cli = recorder("--ckpt_path", str(tmp_path / "a.ckpt"))
    assert cli.read == str(tmp_path / "a.ckpt")
    assert cli.model.width == 5


def test_no_other_file_of_the_commands_uses_private_names() -> None:
    folder = Path(__file__).resolve().parents[2] / "mlssl"
    private = ("self._get(", "self._parser(", "_subcommand_parsers", "_parse_ckpt_path")
    users = {path.name for path in folder.rglob("*.py") if any(one in path.read_text() for one in private)}
    assert users == {"lightning_private.py"}
