"""The record of a run: read from this machine, written atomically, and refused if damaged."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mlssl.run_record import (
    Session,
    _processor,
    command_of_process,
    commit_of,
    hardware_of,
    now,
    read_record,
    versions_of,
    write_record,
)

SESSION = Session(
    started="2025-01-02T03:04:05+01:00",
    command="mlssl fit",
    directory="/home/me",
    versions={"torch": "2"},
    hardware={"devices": 2, "device": "H200", "device_memory_bytes": 15e10, "processor": "EPYC", "cores": 8}
    | {"threads": 1},
    data={"train": {"images": 100, "classes": 5, "labels_per_image": 1.5}},
    first_step=0,
    commit="abc",
    changed_files=2,
)


def test_sessions_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_record(tmp_path) == []
    sessions = [SESSION, replace(SESSION, commit=None, outcome="done", ended=now(), seconds=1.5, last_step=3)]
    write_record(tmp_path, sessions)
    assert read_record(tmp_path) == sessions
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


GOOD = '{"sessions": [{"started": "2025-01-02T03:04:05+01:00", "command": "a", "directory": "b", "versions": {}, '
GOOD += '"hardware": {}, "data": {}, "first_step": 0'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"sessions": 3}',
        '{"sessions": [3]}',
        '{"sessions": [{}]}',
        "[" * 100_000,
        GOOD,
        GOOD + ', "seconds": "long"}]}',
        GOOD + ', "seconds": 1e999}]}',
        GOOD + ', "seconds": NaN}]}',
        GOOD + ', "last_step": -1}]}',
        GOOD + ', "last_step": true}]}',
        GOOD + ', "ended": "yesterday"}]}',
        GOOD.replace('"versions": {}', '"versions": {"torch": 2}') + "}]}",
        GOOD.replace('"data": {}', '"data": {"train": 2}') + "}]}",
        GOOD.replace('"hardware": {}', '"hardware": []') + "}]}",
        "\udcff",
    ],
    ids=range(19),
)
def test_a_damaged_record_is_refused_in_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(text.encode(errors="surrogateescape"))
    remedy = "restore the file, or remove it to continue without the record"
    with pytest.raises(ValueError, match=rf"run\.json is not the record of a run or is damaged .*: {remedy}"):
        read_record(tmp_path)


def test_a_record_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "run.json").open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(ValueError, match="more than 16,000,000 bytes"):
        read_record(tmp_path)


def test_entries_of_a_later_version_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(GOOD + ', "weather": "fine"}]}')
    assert read_record(tmp_path)[0].command == "a"


@pytest.mark.parametrize(
    ("process", "command"),
    [
        (["/env/bin/python", "/env/bin/mlssl", "fit", "--name", "a b"], "mlssl fit --name 'a b'"),
        (["python", "train.py", "--lr", "1"], "python train.py --lr 1"),
        (["/env/bin/python", "-m", "mlssl.cli", "fit"], "python -m mlssl.cli fit"),
        (["/env/bin/python", "train.py", "--api_key", "x"], "python train.py --api_key '***'"),
    ],
)
def test_the_command_is_the_typed_one(process: list[str], command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", process)
    assert command_of_process() == command.replace("'***'", "***")


def test_words_from_a_program_are_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "sweep.py"])
    monkeypatch.setattr(sys, "argv", ["sweep.py"])
    assert command_of_process(["fit", "--name", "a"]) == "mlssl fit --name a"
    monkeypatch.setattr(sys, "argv", ["sweep.py", "fit", "--name", "a"])
    assert command_of_process(["fit", "--name", "a"]) == "python sweep.py"


def test_versions_are_the_installed_ones() -> None:
    found = versions_of(("torch", "no-such-package"))
    assert found == {"python": ".".join(map(str, sys.version_info[:3])), "torch": found["torch"]}
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]


def test_the_commit_is_that_of_the_directory_and_counts_tracked_files_that_changed(tmp_path: Path) -> None:
    assert commit_of(tmp_path / "nowhere") == (None, 0)
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert commit_of(tmp_path) == (None, 0), "a repository without a commit"
    (tmp_path / "train.py").write_text("1\n")
    subprocess.run([*git, "add", "train.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    commit, changed = commit_of(tmp_path)
    assert len(commit or "") == 40
    assert changed == 0
    (tmp_path / "train.py").write_text("2\n")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "new").write_text("not tracked")
    assert commit_of(tmp_path) == (commit, 1)


def test_hardware_of_this_machine() -> None:
    found = hardware_of(torch.device("cpu"))
    assert found["device"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    assert found["processor"]
    assert found["memory_bytes"] is None or found["memory_bytes"] > 1e8


def test_a_processor_without_a_name_gets_its_architecture(tmp_path: Path) -> None:
    assert _processor(tmp_path / "none")
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: EPYC 9\n")
    assert _processor(tmp_path / "cpuinfo") == "EPYC 9"
