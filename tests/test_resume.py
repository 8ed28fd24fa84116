"""Runs that are killed and resumed: the same weights, bit for bit, and the same log as an undisturbed run."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import _killed
import pytest

LONGEST = 300
"""Seconds after which a process counts as hanging."""


def in_a_process(
    folder: Path,
    epochs: int,
    seed: int | None = None,
    number: signal.Signals = signal.SIGKILL,
    whom: _killed.Whom = "itself",
) -> int:
    """Exit code of a new process that trains; negative for the signal that ended it."""
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlssl", "mlssl.callbacks"])
    process = context.Process(target=_killed.run, args=(folder, epochs, seed, number, whom))
    process.start()
    process.join(LONGEST)
    assert process.exitcode is not None, f"the process hangs after seed {seed}"
    assert process.exitcode != 255, "multiprocessing lost its fork server, and with it the exit code of the process"
    return process.exitcode


Undisturbed = Callable[[int], Path]
"""Epochs -> folder of an undisturbed run of that length."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")

    @cache
    def of(epochs: int) -> Path:
        assert in_a_process(folder / str(epochs), epochs) == 0
        return folder / str(epochs)

    return of


def compare(disturbed: Path, undisturbed: Path, epochs: int) -> None:
    """Both runs end with the same bits and the same log."""
    found, expected = ((folder / "hash").read_text() for folder in (disturbed, undisturbed))
    print(f"undisturbed:\n{expected}disturbed:\n{found}", end="")
    assert found == expected
    logged = _killed.log_of(disturbed)
    assert logged == _killed.log_of(undisturbed)
    assert [int(row["step"]) for row in logged if "train/loss" in row] == list(range(epochs * _killed.STEPS))


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "epochs"), [(5, 3), pytest.param(20, 10, marks=pytest.mark.thorough)])
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(
    kills: int, epochs: int, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    disturbed, start = tmp_path / "disturbed", time.monotonic()
    for kill in range(kills):
        assert in_a_process(disturbed, epochs, kill) == -signal.SIGKILL, f"kill {kill} came too late"
    assert in_a_process(disturbed, epochs) == 0
    print(f"{kills} kills in {time.monotonic() - start:.0f} s")
    compare(disturbed, undisturbed(epochs), epochs)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["itself", "all"])
def test_a_run_saves_its_current_step_on_sigterm(whom: _killed.Whom, tmp_path: Path, undisturbed: Undisturbed) -> None:
    """If the signal reaches the workers too, as from `timeout` and schedulers, there is no next batch."""
    disturbed = tmp_path / "disturbed"
    assert in_a_process(disturbed, 2, 1, signal.SIGTERM, whom) == 0
    assert (disturbed / "last.ckpt").exists()
    assert not (disturbed / "hash").exists(), "it ran to its end"
    assert in_a_process(disturbed, 2) == 0
    compare(disturbed, undisturbed(2), 2)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["a worker", "the next pass"])
def test_a_run_with_a_dead_worker_saves_a_complete_step(
    whom: _killed.Whom, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    """It is noticed when its next batch is due, in the same epoch or at the start of the next one."""
    disturbed = tmp_path / "disturbed"
    assert in_a_process(disturbed, 2, 5, whom=whom) == 1
    assert not (disturbed / "hash").exists(), "it ran to its end"
    assert in_a_process(disturbed, 2) == 0
    compare(disturbed, undisturbed(2), 2)
