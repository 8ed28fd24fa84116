"""Hyper-parameters of an untrusted checkpoint: plain values are used, and nothing is imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning as L
import pytest
import torch
from torch import nn

from commands.test_run import DATA, MODEL, TRAINER
from mlssl import MultiLabelSSLModule
from mlssl.cli import main
from mlssl.commands.hyper_parameters import plain_hyper_parameters
from mlssl.runs import RUN_FOLDER_VARIABLE

SMALL = [*MODEL, *TRAINER, *DATA]
TRAP = "open('trapped', 'w').close()\n\n\ndef trap(*arguments, **settings):\n    return None\n"


class Base:
    """Takes the arguments of its base class."""

    def __init__(self, width: int = 1, name: str = "a", network: str | nn.Module = "b") -> None: ...


class Own(Base):
    """Takes more arguments, of many types."""

    def __init__(
        self,
        *args: Any,
        layer: nn.Module | None = None,
        function: Callable[..., Any] | str | None = None,
        kind: Literal["x", "y"] = "x",
        sizes: list[int] | None = None,
        names: list[str | nn.Module] | None = None,
        layers: list[nn.Module] | None = None,
        untyped=None,
        **settings: Any,
    ) -> None: ...


def test_plain_values_of_known_arguments_are_taken() -> None:
    given = {
        **{
            "width": 2,
            "name": "os.path",
            "network": "resnet50.a1_in1k",
            "kind": "y",
            "sizes": [1, 2],
            "untyped": "text",
        },
        "names": ["one", "two"],
    }
    assert plain_hyper_parameters({**given, "unknown": 3}, Own, "a.ckpt") == given


@pytest.mark.parametrize(
    "given",
    [
        {"layer": "torch.nn.Identity"},
        {"layers": ["torch.nn.Identity"]},
        {"function": "os.system"},
        {"name": "custom my.form"},
        {"width": torch.zeros(1)},
        {"sizes": {1: 2}},
    ],
    ids=str,
)
def test_values_that_the_parser_would_instantiate_are_left_out(given: dict[str, Any]) -> None:
    assert plain_hyper_parameters(given, Own, "a.ckpt") == {}


@pytest.mark.parametrize(
    "given",
    [
        {"_instantiator": "os.system"},
        {"_class_path": "os.system"},
        {"untyped": {"class_path": "os.system", "init_args": {"command": "true"}}},
        {"sizes": [{"deep": [{"_instantiator": "lightning.pytorch.cli.instantiate_module"}]}]},
        {"unknown": {"class_path": "os.system"}},
    ],
    ids=str,
)
def test_code_at_any_depth_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"parameters of a\.ckpt name code to import \('.*'\), which those of mlssl"):
        plain_hyper_parameters(given, Own, "a.ckpt")


def test_entries_that_lightning_writes_are_ignored() -> None:
    given = {"_instantiator": "lightning.pytorch.cli.instantiate_module", "width": 2}
    assert plain_hyper_parameters(given, Own, "a.ckpt") == {"width": 2}


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module that writes a file when it is imported."""
    monkeypatch.chdir(tmp_path)
    for name in (RUN_FOLDER_VARIABLE, "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    name = f"trap_{tmp_path.name.replace('-', '_')}"
    Path(f"{name}.py").write_text(TRAP)
    return name


def received(**changes: Any) -> str:
    """A checkpoint of a Trainer with other hyper-parameters."""
    module = MultiLabelSSLModule("test_resnet", projection_dim=16, predictor_dim=8)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", **quiet)
    trainer.strategy.connect(module)
    trainer.save_checkpoint("received.ckpt")
    checkpoint = torch.load("received.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] |= changes
    torch.save(checkpoint, "received.ckpt")
    return "received.ckpt"


@pytest.mark.parametrize("command", ["fit", "validate"])
@pytest.mark.parametrize("name", ["form", "positives", "backbone"])
def test_no_command_imports_a_path_from_a_received_checkpoint(
    command: str, name: str, trap: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TRAINER, *DATA, "--ckpt_path", received(**{name: f"{trap}.trap"})]
    assert main([command, *words]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("mlssl: error: ")]
    assert f"{trap}.trap" in line
    assert not Path("trapped").exists()


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_code_in_a_received_checkpoint_is_refused_in_one_line(
    command: str, trap: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for changes in ({"_instantiator": f"{trap}.trap"}, {"backbone_kwargs": {"class_path": f"{trap}.trap"}}):
        assert main([command, *TRAINER, *DATA, "--ckpt_path", received(**changes)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("mlssl: error: The hyper-parameters of received.ckpt name code to import")
        assert not Path("trapped").exists()


def test_a_file_without_hyper_parameters_is_reported(trap: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = {
        "other.ckpt has no state_dict, so it is not a Trainer checkpoint": [1],
        "The entry 'hyper_parameters' of other.ckpt does not have": {"hyper_parameters": [1], "state_dict": {}},
    }
    for message, content in said.items():
        torch.save(content, "other.ckpt")
        assert main(["validate", *TRAINER, *DATA, "--ckpt_path", "other.ckpt"]) == 2
        assert message in capsys.readouterr().err


def test_given_settings_override_those_of_a_checkpoint(trap: str) -> None:
    path = received(base_lr=0.5, contrastive_weight=2.0)
    few = ["--trainer.limit_val_batches", "1", "--model.base_lr", "0.25"]
    Path(f"{trap}_callback.py").write_text(
        "import lightning as L\n\n\nclass Settings(L.Callback):\n"
        "    def on_validation_start(self, trainer, pl_module):\n"
        "        with open('settings', 'w') as file:\n"
        "            print(pl_module.base_lr, pl_module.contrastive_weight, file=file)\n"
    )
    callback = ["--trainer.callbacks", f"{trap}_callback.Settings"]
    assert main(["validate", *TRAINER, *DATA, *few, "--ckpt_path", path, *callback]) == 0
    assert Path("settings").read_text() == "0.25 2.0\n"
