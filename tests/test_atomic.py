"""Atomic file writes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import mlssl.atomic
from mlssl.atomic import (
    FullDiskError,
    NotWritableError,
    errors_named,
    files_written_aside,
    folder_written_aside,
    remove_leftovers,
    written_aside,
)

ALONE = (
    f"import sys; sys.path.insert(0, {str(Path(mlssl.atomic.__file__).parents[1])!r})\n"
    "from mlssl.atomic import files_written_aside, folder_written_aside, written_aside\n"
)
"""Of which none imports torch."""


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "numbers.txt"
    with written_aside(path) as aside:
        assert aside.parent == path.parent
        assert aside.suffix == ".txt"
        aside.write_text("1 2 3")
        assert not path.exists()
    assert path.read_text() == "1 2 3"
    assert names(path.parent) == ["numbers.txt"]


def test_a_previous_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "numbers.txt"
    path.write_text("old")
    with written_aside(str(path)) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_a_failing_write_leaves_the_previous_file_and_no_temporary_file(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "numbers.txt"
    path.write_text("old")

    def write_half() -> None:
        with written_aside(path) as aside:
            aside.write_text("ol")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["numbers.txt"]


def test_a_failing_flush_counts_as_a_failing_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(
            OSError,
            match=r"No space left on device: '.*numbers.txt': nothing new was kept, and an existing file",
        ),
        written_aside(tmp_path / "numbers.txt") as aside,
    ):
        aside.write_text("1 2 3")
    assert names(tmp_path) == []


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), written_aside(tmp_path / "numbers.txt"):
        pass
    assert names(tmp_path) == []


def test_the_error_of_another_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"), written_aside(tmp_path / "numbers.txt"):
        (tmp_path / "missing.txt").read_text()


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX's")
def test_a_real_write_to_a_full_disk_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "big.bin").write_text("old")
    limited = ALONE + (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"with written_aside({str(tmp_path / 'big.bin')!r}) as aside: aside.write_bytes(bytes(5000))"
    )
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"FullDiskError: [Errno {errno.EFBIG}] File too large: '{tmp_path / 'big.bin'}'" in done.stderr
    assert (tmp_path / "big.bin").read_text() == "old"
    assert names(tmp_path) == ["big.bin"]


def test_a_process_killed_at_any_time_leaves_a_complete_file(tmp_path: Path) -> None:
    path = tmp_path / "numbers.bin"
    endless = ALONE + (
        "import itertools\n"
        "for value in itertools.count():\n"
        f"    with written_aside({str(path)!r}) as aside: aside.write_bytes(bytes([value % 256]) * 3_000_000)"
    )
    for patience in (0.0, 0.013, 0.031):
        path.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", endless])
        started = time.monotonic()
        while not path.exists() and time.monotonic() < started + 60:
            time.sleep(0.001)
        time.sleep(patience)
        process.kill()
        process.wait()
        content = path.read_bytes()
        assert content == content[:1] * 3_000_000


def test_files_appear_together_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with files_written_aside(tmp_path) as aside:
        for name in ("a.txt", "b.txt"):
            (aside / name).write_text(name)
        assert [name for name in names(tmp_path) if not name.startswith(".")] == ["mine.txt"]
    assert names(tmp_path) == ["a.txt", "b.txt", "mine.txt"]


def write_files(folder: Path, contents: dict[str, str], *, overwrite: bool = False, fail: bool = False) -> None:
    with files_written_aside(folder, overwrite=overwrite) as aside:
        for name, content in contents.items():
            (aside / name).write_text(content)
        if fail:
            raise ValueError("no")


def test_files_of_the_same_name_are_replaced_only_when_asked_and_then_all_or_none(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"b\.txt exists: choose another folder or name, or pass overwrite=True"):
        write_files(tmp_path, {"a.txt": "new", "b.txt": "new"})
    assert names(tmp_path) == ["b.txt"]
    assert (tmp_path / "b.txt").read_text() == "mine"
    write_files(tmp_path, {"b.txt": "mine"})  # the same content
    write_files(tmp_path, {"b.txt": "new"}, overwrite=True)
    assert (tmp_path / "b.txt").read_text() == "new"


def test_a_created_folder_is_removed_on_failure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"):
        write_files(tmp_path / "new", {"a.txt": "a"}, fail=True)
    assert names(tmp_path) == []


# ---------------------------------------------------------------------- what killed processes leave


def killed_inside(block: str) -> None:
    """Run a process that is killed inside one of the blocks, once it has written a megabyte."""
    program = (
        ALONE + f"import os, signal\nwith {block} as aside:\n    file = aside / 'a' if aside.is_dir() else aside\n"
    )
    program += "    file.write_bytes(bytes(1_000_000)); os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == -9


def test_leftovers_of_killed_processes_are_removed_and_no_other_files(tmp_path: Path) -> None:
    others = {".hidden", ".a.yaml", "deadbeef", ".last.deadbee.ckpt", "a.deadbeef.ckpt", "folder"}
    (tmp_path / "folder").mkdir()
    for name in others - {"folder"}:
        (tmp_path / name).write_text("")
    for name in ("last.ckpt", "epoch=0-step=3.ckpt", "metrics"):
        killed_inside(f"written_aside({str(tmp_path / name)!r})")
    assert len(names(tmp_path)) == len(others) + 3
    assert remove_leftovers(tmp_path) == 3_000_000
    assert set(names(tmp_path)) == others
    assert remove_leftovers(tmp_path / "none") == 0


def test_leftover_folders_of_killed_processes_are_removed_by_the_next(tmp_path: Path) -> None:
    killed_inside(f"files_written_aside({str(tmp_path / 'exports')!r})")
    killed_inside(f"folder_written_aside({str(tmp_path / 'packed')!r})")
    (tmp_path / ".packed.mine").mkdir()
    assert len(names(tmp_path)) == 4  # with the lock of a dead process
    write_files(tmp_path / "exports", {"a.txt": "a"})
    with folder_written_aside(tmp_path / "packed") as aside:
        (aside / "a.txt").write_text("a")
    assert names(tmp_path) == [".packed.mine", "exports", "packed"]
    assert names(tmp_path / "exports") == ["a.txt"]


def test_a_second_process_is_refused_or_waits(tmp_path: Path) -> None:
    with folder_written_aside(tmp_path / "packed") as aside:
        (aside / "a.txt").write_text("a")
        block = f"with folder_written_aside({str(tmp_path / 'packed')!r}): pass"
        second = subprocess.run([sys.executable, "-c", ALONE + block], capture_output=True, text=True, check=False)
        assert f"packed is in use by process {os.getpid()} on " in second.stderr
    with files_written_aside(tmp_path / "exports") as aside:
        block = f"with files_written_aside({str(tmp_path / 'exports')!r}) as one: (one / 'a.txt').write_text('second')"
        second = subprocess.Popen([sys.executable, "-c", ALONE + block], stderr=subprocess.PIPE, text=True)
        assert second.stderr is not None
        assert f"exports is in use by process {os.getpid()} on " in second.stderr.readline()
        (aside / "a.txt").write_text("first")
    _, said = second.communicate(timeout=60)
    assert "a.txt exists: choose another folder or name" in said
    assert names(tmp_path / "exports") == ["a.txt"]
    assert (tmp_path / "exports" / "a.txt").read_text() == "first"


# ---------------------------------------------------------------------- the file that an error names


def fail(error: Exception, path: Path, aside: Path | None = None) -> None:
    with errors_named(path, aside):
        raise error


@pytest.mark.parametrize("given", [None, "/a/.x.0.txt", "/a/x.txt"])
@pytest.mark.parametrize(
    ("number", "kind", "advice"),
    [
        (errno.ENOSPC, FullDiskError, "an existing file is intact; free some space"),
        (errno.EDQUOT, FullDiskError, "an existing file is intact; free some space"),
        (errno.EROFS, NotWritableError, "nothing was changed; choose another path, or check its permissions"),
        (errno.EACCES, NotWritableError, "nothing was changed; choose another path, or check its permissions"),
    ],
)
def test_errors_name_the_file_of_the_user_and_what_to_do(
    given: str | None, number: int, kind: type[OSError], advice: str
) -> None:
    with pytest.raises(kind, match=f"'/a/x.txt': .*{advice}"):
        fail(OSError(number, os.strerror(number), given), Path("/a/x.txt"), Path("/a/.x.0.txt"))


def test_errors_in_a_temporary_folder_name_the_final_files() -> None:
    with pytest.raises(FullDiskError, match=r"'/a/exports/x\.pth'"):
        fail(OSError(errno.ENOSPC, "No space left", "/a/exports/.0/x.pth"), Path("/a/exports"), Path("/a/exports/.0"))


def test_a_full_disk_reported_by_safetensors_is_recognised() -> None:
    with pytest.raises(FullDiskError, match=r"No space left on device: '/a/x\.safetensors'"):
        fail(Exception("I/O error: No space left on device (os error 28)"), Path("/a/x.safetensors"))
    with pytest.raises(ValueError, match="another"):
        fail(ValueError("another"), Path("/a/x.safetensors"))


def test_errors_of_other_files_and_errors_without_a_number_are_not_changed() -> None:
    with pytest.raises(PermissionError, match=r"'/b/y\.txt'$"):
        fail(OSError(errno.EACCES, "Permission denied", "/b/y.txt"), Path("/a/x.txt"))
    with pytest.raises(OSError, match=r"^in words$"):
        fail(OSError("in words"), Path("/a/x.txt"))


@pytest.mark.parametrize("block", [written_aside, files_written_aside, folder_written_aside])
def test_an_unwritable_path_is_named(block: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with (
        pytest.raises(NotWritableError, match=r"Read-only file system: '.*new.*nothing was changed"),
        block(tmp_path / "new" / "a.txt"),
    ):
        pass
