"""One of two processes is killed: the other ends soon, with one sentence that names the rank."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_processes_of_a_run import SMALL, SRUN, by_torchrun, filled, free_port, started

import mlssl.commands.other_processes as other_processes
from mlssl.commands.other_processes import OtherProcesses, Process

GLOO = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:61")


def number_of_rank_1(parent: int) -> int | None:
    """The process with this rank among the descendants of another."""
    children = [int(one) for one in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    for child in children:
        if b"\0LOCAL_RANK=1\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            return child
        found = number_of_rank_1(child)
        if found is not None:
            return found
    return None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the process by /proc")
@pytest.mark.parametrize("starter", ["srun", pytest.param("torchrun", marks=pytest.mark.thorough)])
def test_the_others_end_and_name_the_rank(starter: str, tmp_path: Path) -> None:
    words = ["fit", *SMALL, "--trainer.devices", "2", "--trainer.max_epochs", "1000"]
    if starter == "srun":  # two processes that nothing else looks after
        port, words = free_port(), [*words, "--trainer.devices", "1", "--trainer.num_nodes", "2"]
        commands = [(["-m", "mlssl.cli", *words], filled(SRUN, number, port)) for number in (0, 1)]
    else:
        commands = [(by_torchrun(words), {})]
    all_running = [started(command, tmp_path, **variables) for command, variables in commands]
    running = all_running[0]
    try:
        while not list(tmp_path.glob("runs/*/metrics.csv")):
            assert running.poll() is None, running.communicate()[0]
            time.sleep(0.2)
        number = all_running[1].pid if starter == "srun" else number_of_rank_1(running.pid)
        assert number is not None
        os.kill(number, signal.SIGKILL)
        killed = time.monotonic()
        printed = running.communicate(timeout=60)[0]
    finally:
        for one in all_running:
            one.kill()
            one.communicate()
    assert time.monotonic() - killed < 30
    assert running.returncode != 0
    said = rf"mlssl: error: This is rank 0, and rank 1 \(process {number} on .*\) ended during the run: check its"
    assert re.search(said, printed), printed


@pytest.fixture
def ended_process() -> Iterator[Process]:
    """A process that has ended without being waited for, like a killed process of a launcher."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    while other_processes._is_running(child.pid):
        time.sleep(0.05)
    yield Process(3, socket.gethostname(), child.pid)
    child.wait()


def test_errors_of_a_collective_name_the_ended_process(ended_process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_processes, "GRACE_SECONDS", 0.0)
    callback = OtherProcesses()
    assert callback.describe_ended(GLOO) is None  # of a single process
    callback._others = [Process(1, socket.gethostname(), os.getpid()), ended_process]
    assert callback.describe_ended(ValueError("of this process itself")) is None
    monkeypatch.setattr(other_processes, "GRACE_SECONDS", 1.0)
    said = callback.describe_ended(GLOO)
    assert said is not None
    assert said.startswith(f"This is rank 0, and rank 3 (process {ended_process.number} on {ended_process.host}) ended")
    callback._others = [Process(1, "elsewhere", 1)]
    said = callback.describe_ended(GLOO)
    assert said is not None
    assert "a process on another machine, or one that is still ending, ended during the run" in said


@pytest.mark.slow
def test_a_process_that_waits_in_a_collective_is_ended(ended_process: Process) -> None:
    """It cannot be interrupted: it prints the sentence and ends."""
    program = (
        "import threading, time\n"
        "from mlssl.commands import other_processes as other\n"
        "other.GRACE_SECONDS = other.SECONDS_BETWEEN_CHECKS = 0.1\n"
        "callback = other.OtherProcesses()\n"
        f"callback._others = [other.Process{tuple(ended_process)!r}]\n"
        "threading.Thread(target=callback._watch, daemon=True).start()\n"
        "time.sleep(60)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert re.fullmatch(
        r"mlssl: error: This is rank 0, and rank 3 \(.*\) ended during the run: check .*\n", ended.stderr
    )
