"""The bar of a run: complete at every width, over the whole run, and at the position of a resumed run."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from _terminal import Terminal

from mlssl.callbacks import OnlineLinearProbe, RunBar, Throughput
from mlssl.callbacks.position import position_of
from mlssl.callbacks.run_bar import bar_format

Make = Callable[..., Any]


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Terminal]:
    """A function that replaces standard error by a terminal of the given number of columns."""

    def open_terminal(columns: int) -> Terminal:
        terminal = Terminal(columns)
        monkeypatch.setattr(sys, "stderr", terminal.writer)
        monkeypatch.setattr("mlssl.callbacks.run_bar.SECONDS_BETWEEN_UPDATES", 0.0)
        return terminal

    return open_terminal


def bars(terminal: Terminal) -> list[str]:
    terminal.close()
    return [line for line in terminal.drawn if line.startswith(("epoch", "val", "validate", "predict"))]


@pytest.mark.parametrize("columns", [80, 200])
def test_the_bar_of_a_run_is_complete_and_starts_at_its_position(
    columns: int, on_terminal: Make, make_model: Make, make_data: Make, make_trainer: Make, tmp_path: Path
) -> None:
    terminal = on_terminal(columns)
    shown: dict[str, Any] = {"enable_progress_bar": True, "log_every_n_steps": 1}
    first = make_trainer(RunBar(), OnlineLinearProbe(), Throughput(), max_epochs=1, **shown)
    first.fit(make_model(), make_data())
    first.save_checkpoint(tmp_path / "one.ckpt")
    number = len(terminal.drawn)
    # In the folder of the first, where a resumed run finds its log.
    second = make_trainer(
        RunBar(), OnlineLinearProbe(), Throughput(), max_epochs=2, **shown, default_root_dir=first.default_root_dir
    )
    second.fit(make_model(), make_data(), ckpt_path=tmp_path / "one.ckpt")
    drawn = bars(terminal)
    assert all(len(line) <= columns for line in terminal.drawn)
    assert drawn[0].startswith("epoch 1/1 ")
    assert any(line.startswith("val 3/3 ") for line in drawn[:number])
    resumed = next(line for line in drawn if line.startswith("epoch 2/2"))
    assert " 50% " in resumed
    assert "probe mAP 0." in resumed
    last = drawn[-1]
    assert last.startswith("epoch 2/2 ")
    for part in (" 100% 0:00 left, ", "loss ", "probe mAP 0.", " images/s"):
        assert part in last
    assert "█" in last
    assert len(last) >= columns - 1


def test_validation_and_prediction_outside_a_fit_have_their_own_bar(
    on_terminal: Make, make_model: Make, make_data: Make, make_trainer: Make
) -> None:
    terminal = on_terminal(80)
    trainer, data = make_trainer(RunBar(), enable_progress_bar=True), make_data()
    trainer.validate(make_model(), data, verbose=False)
    trainer.predict(make_model(), data)
    drawn = bars(terminal)
    assert any(line.startswith("validate █") and " 100% 0:00 left" in line for line in drawn)
    assert drawn[-1].startswith("predict █")
    assert not any(line.startswith("epoch") for line in drawn)


def test_without_a_terminal_lines_are_printed(
    make_model: Make, make_data: Make, make_trainer: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(RunBar(), Throughput(), enable_progress_bar=True).fit(make_model(), make_data())
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch")]
    assert len(lines) == 1  # the last; the others would come once a minute
    assert lines[0].startswith("epoch 2/2 100% 0:00 left, loss ")


def test_no_line_is_printed_twice(
    make_model: Make,
    make_data: Make,
    make_trainer: Make,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("mlssl.callbacks.run_bar.SECONDS_OF_LINES", 0.0)
    make_trainer(RunBar(), enable_progress_bar=True, max_epochs=1).fit(make_model(), make_data(val=None))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch")]
    assert len(lines) == 4  # one per step; the end adds nothing


def test_a_bar_of_the_longest_run_leaves_room_at_80_columns() -> None:
    line = bar_format("epoch 1000/1000", 0.99, 47 * 3600 + 3599, loss=12.345, probe=0.3, rate=1234.5)
    assert line == "epoch 1000/1000 {bar} 99% 47:59:59 left, loss 12.35, probe mAP 0.300, 1234 images/s"
    assert len(line.replace("{bar}", "")) <= 78
    assert bar_format("epoch 1", 0, math.inf) == "epoch 1 {bar} 0% -:-- left"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_epochs": 3}, (13, 30)),
        ({"max_epochs": 3, "max_steps": 7, "accumulate_grad_batches": 2}, (13, 14)),
        ({"max_epochs": -1}, (13, math.inf)),
        ({"max_epochs": 1}, (13, 13)),  # a run past its end
        ({"max_epochs": 3, "num_training_batches": math.inf, "current_epoch": 0}, (3, math.inf)),
    ],
)
def test_the_position_counts_batches_of_the_whole_run(settings: dict[str, Any], expected: Any) -> None:
    trainer = {"num_training_batches": 10, "current_epoch": 1, "max_steps": -1, "accumulate_grad_batches": 1}
    assert position_of(SimpleNamespace(**{**trainer, **settings}), 3) == expected  # type: ignore[arg-type]


def test_only_the_first_process_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    bar = RunBar()
    bar.setup(SimpleNamespace(is_global_zero=False), L.LightningModule(), "fit")  # type: ignore[arg-type]
    bar._count("test", 0, 2)
    bar.teardown(SimpleNamespace(), L.LightningModule(), "fit")  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""
