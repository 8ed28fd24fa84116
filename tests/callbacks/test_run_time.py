"""The duration of a run is estimated from its steps, and options that halve it from its settings."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from mlssl.callbacks import RunTime
from mlssl.callbacks.run_time import LIGHTER, ways_to_halve

WAIT, COMPUTE = 1.0, 3.0


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"backbone": "resnet50"})


def said_after(steps: int, monkeypatch: pytest.MonkeyPatch, caplog: Any, done: int = 0, **settings: Any) -> list[str]:
    """The messages in the given number of steps, each after a wait of 1 s; the first three take a minute longer."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    trainer: Any = SimpleNamespace(
        **{
            "accumulate_grad_batches": 1,
            "current_epoch": done // 100,
            "datamodule": None,
            "max_epochs": 10,
            "max_steps": -1,
            "num_training_batches": 100,
            **settings,
        }
    )
    watch, module = RunTime(), Module()
    watch.on_train_start(trainer, module)
    watch.on_train_epoch_start(trainer, module)
    with caplog.at_level("INFO"):
        for step in range(steps):
            clock[0] += WAIT
            watch.on_train_batch_start(trainer, module, None, done % 100 + step)
            clock[0] += COMPUTE if step >= 3 else 60.0
            watch.on_train_batch_end(trainer, module, None, None, done % 100 + step)
    return [line for message in caplog.messages for line in message.splitlines()]


def test_the_estimate_is_printed_once_at_the_twentieth_step_without_the_first_three(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert said_after(19, monkeypatch, caplog) == []
    said = said_after(40, monkeypatch, caplog)
    assert said[0].startswith("time      about 1 h 5 min for 980 more steps of 4 s,")
    assert len(said[0]) <= 80
    assert said[1:3] == ["to about halve it:", "  --trainer.max_epochs 5       half the epochs"]
    assert len(said) == 3  # a quarter of a step is spent waiting: another network would not halve it


def test_a_resumed_run_prints_only_the_time(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (said,) = said_after(20, monkeypatch, caplog, done=550)
    assert "about 29 min for 430 more steps" in said


@pytest.mark.parametrize(
    "settings", [{"max_epochs": -1}, {"num_training_batches": math.inf}, {"max_epochs": -1, "max_steps": 20}]
)
def test_a_run_without_an_end_or_at_its_end_prints_nothing(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert said_after(20, monkeypatch, caplog, **settings) == []


def test_a_short_run_gets_no_suggestions(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (said,) = said_after(20, monkeypatch, caplog, max_epochs=-1, max_steps=25)
    assert "about 20 s for 5 more steps" in said


@pytest.mark.parametrize(
    ("settings", "waiting", "options"),
    [
        ({"max_steps": 900, "size": 64, "backbone": "resnet18"}, 0.1, ["max_steps 450", "size 48", "resnet10t"]),
        ({"max_epochs": 1, "size": 32, "backbone": "own"}, 0.1, []),
        ({"max_epochs": 9, "size": 224, "backbone": "vit_small_patch14_dinov2"}, 0.1, ["max_epochs 4"]),
        ({"max_epochs": 9, "size": 224, "workers": 1, "cores": 8}, 0.5, ["max_epochs 4", "num_workers 2"]),
        ({"max_epochs": 9, "size": 224, "workers": 1, "cores": 2}, 0.5, ["max_epochs 4"]),
    ],
)
def test_only_options_that_help_are_suggested(settings: dict[str, Any], waiting: float, options: list[str]) -> None:
    lines = ways_to_halve(settings, waiting)
    assert len(lines) == len(options)
    for line, option in zip(lines, options, strict=True):
        assert option in line
        assert line.startswith("  --")


def operations(name: str) -> int:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        timm.create_model(name, num_classes=0).eval()(torch.empty(1, 3, 224, 224))
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["resnet50", "resnet18", "convnext_tiny", "vit_small_patch16_224"])
def test_a_lighter_network_takes_the_stated_fraction(name: str) -> None:
    lighter, share = LIGHTER[name]
    assert operations(lighter) / operations(name) == pytest.approx(share, abs=0.02)
