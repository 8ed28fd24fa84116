"""Locks: one process at a time, and no lock left by a dead one."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import mlssl.locks
from mlssl.locks import locked

HOLDS = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
from locks import locked
with locked(sys.argv[1], "it", wait=False):
    if sys.argv[3] == "forks":
        begun, begins = os.pipe()
        if os.fork() == 0:
            os.write(begins, b"!")
            os.close(1)
            time.sleep(30)
            os._exit(0)
        os.read(begun, 1)  # by then the fork has let go of the lock
    print("holds", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(path: Path, how: str = "alone") -> Iterator[subprocess.Popen[str]]:
    """A process that keeps the lock until its standard input is closed."""
    words = [sys.executable, "-c", HOLDS, str(path), str(Path(mlssl.locks.__file__).parent), how]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_the_second_is_refused_with_host_and_process_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with holder(path) as process:
        said = f"runs/a is in use by process {process.pid} on {re.escape(socket.gethostname())}: wait until it has"
        with pytest.raises(OSError, match=said), locked(path, "runs/a", wait=False):
            pass


def test_the_second_waits_and_names_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".lock"
    with holder(path) as process:
        tries = []

        def sleep(seconds: float) -> None:
            tries.append(seconds)
            process.stdin.close()  # type: ignore[union-attr]
            process.wait()

        monkeypatch.setattr(time, "sleep", sleep)
        with (
            pytest.warns(match=f"it is in use by process {process.pid} on .*: waiting until it has ended"),
            locked(path, "it", wait=True),
        ):
            assert tries == [mlssl.locks.SECONDS_BETWEEN_TRIES]
    assert not path.exists()


@pytest.mark.parametrize("how", ["alone", "forks"])
def test_the_lock_of_a_killed_process_is_free(how: str, tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with holder(path, how) as process:
        process.kill()
        process.wait()
        assert path.exists()
        with locked(path, "it", wait=False) as is_alone:
            assert is_alone
        assert not path.exists()


def test_a_lock_can_be_taken_again_and_again_also_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    for _ in range(3):
        with pytest.raises(KeyError), locked(path, "it", wait=False):
            raise KeyError(path.stat())
        assert not path.exists()


def test_a_lock_file_without_content_causes_no_other_error(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="it is in use by another process: wait"), locked(path, "it", wait=False):
            pass


def test_a_lock_file_that_was_removed_meanwhile_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flock, times = tmp_path / ".lock", fcntl.flock, []

    def removed_first(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        times.append(descriptor)
        if len(times) == 1:
            path.unlink()

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with locked(path, "it", wait=False):
        assert path.exists()
    assert len(times) == 2


def failing(number: int) -> Any:
    def fail(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.EOPNOTSUPP))
    with (
        pytest.warns(match=r"cannot be locked \(.*\): make sure that no other process writes to it"),
        locked(tmp_path / ".lock", "it", wait=False) as is_alone,
    ):
        assert not is_alone


def test_another_error_of_the_file_system_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path / ".lock", "it", wait=False):
        pass


def test_a_folder_that_cannot_be_written_to_needs_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing(errno.EROFS))
        with locked(tmp_path / ".lock", "it", wait=False) as is_alone:
            assert not is_alone
    with pytest.raises(FileNotFoundError), locked(tmp_path / "none" / ".lock", "it", wait=False):
        pass
