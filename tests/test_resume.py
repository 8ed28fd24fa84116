"""Runs that are killed and go on: the same weights, bit for bit, and the same log as a run that nobody disturbed."""

from __future__ import annotations

import multiprocessing
import signal
import time
from pathlib import Path

import _killed
import pytest

LONGEST = 300
"""Seconds after which a process counts as hanging."""


def in_a_process(
    folder: Path, name: str, epochs: int, seed: int | None = None, number: signal.Signals = signal.SIGKILL
) -> int:
    """Exit code of a fresh process that trained; the negative of a signal that ended it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlssl", "mlssl.callbacks"])
    process = context.Process(target=_killed.run, args=(folder, name, epochs, seed, number))
    process.start()
    process.join(LONGEST)
    assert process.exitcode is not None, f"the process hangs: {name}"
    return process.exitcode


def compare(disturbed: Path, names: list[str], folder: Path, epochs: int) -> None:
    """The run in `disturbed` and an undisturbed one in `folder` end with the same bits and say the same."""
    assert in_a_process(folder, "log", epochs) == 0
    found, expected = ((place / "hash").read_text() for place in (disturbed, folder))
    print(f"undisturbed:\n{expected}disturbed:\n{found}", end="")
    assert found == expected
    logged = _killed.log_of(disturbed, names)
    assert logged == _killed.log_of(folder, ["log"])
    assert {step for step, name in logged if name == "train/loss"} == set(range(epochs * _killed.STEPS))


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "epochs"), [(5, 3), pytest.param(20, 10, marks=pytest.mark.thorough)])
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(kills: int, epochs: int, tmp_path: Path) -> None:
    disturbed, start = tmp_path / "disturbed", time.monotonic()
    disturbed.mkdir()
    for kill in range(kills):
        assert in_a_process(disturbed, str(kill), epochs, kill) == -signal.SIGKILL, f"kill {kill} came too late"
    assert in_a_process(disturbed, "last", epochs) == 0
    print(f"{kills} kills in {time.monotonic() - start:.0f} s")
    compare(disturbed, [*map(str, range(kills)), "last"], tmp_path, epochs)


@pytest.mark.slow
def test_a_run_that_is_asked_to_end_saves_the_step_it_is_in(tmp_path: Path) -> None:
    disturbed = tmp_path / "disturbed"
    disturbed.mkdir()
    for stop in (0, 1):
        assert in_a_process(disturbed, str(stop), 2, stop, signal.SIGTERM) == 0
        assert (disturbed / "last.ckpt").exists()
        assert not (disturbed / "hash").exists(), "it ran to its end"
    assert in_a_process(disturbed, "last", 2) == 0
    compare(disturbed, ["0", "1", "last"], tmp_path, 2)
