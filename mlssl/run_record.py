"""run.json: versions, commit, hardware, command, data and time of a run, so that others can repeat it."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mlssl.atomic import written_aside
from mlssl.redacted import redacted

RUN_RECORD = "run.json"
PACKAGES = ("mlssl", "torch", "lightning", "timm", "torchvision")

RUNNING, DONE, INTERRUPTED, FAILED = "running", "done", "interrupted", "failed"
"""Outcomes of a session; a killed one remains "running"."""

_LARGEST = 16_000_000
"""Maximum size in bytes of a file to read."""

_GIT_SECONDS = 10
"""Timeout in seconds after which the commit is left out, as on a slow disk."""

_REMEDY = "restore the file, or remove it to continue without the record"


@dataclass
class Session:
    """One process of a run, from start to end: a resumed run has several."""

    started: str
    """Date and time with its offset from UTC, ISO 8601."""
    command: str
    """The typed command line, with secrets hidden."""
    directory: str
    """Working directory of the command."""
    versions: dict[str, str]
    """Package → version, including Python's."""
    hardware: dict[str, Any]
    """Result of `hardware_of`, and the Trainer's devices."""
    data: dict[str, dict[str, Any]]
    """Set → images, and for a labelled set classes and labels_per_image."""
    first_step: int
    commit: str | None = None
    """Commit of the git repository that contains the directory."""
    changed_files: int = 0
    """Number of tracked files that differ from the commit."""
    last_step: int = 0
    seconds: float = 0.0
    outcome: str = RUNNING
    """One of the four outcomes; a failure names its exception."""
    ended: str | None = None


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("started", "command", "directory", "outcome"), (str,)),
    **dict.fromkeys(("versions", "hardware", "data"), (dict,)),
    **dict.fromkeys(("first_step", "changed_files", "last_step"), (int,)),
    **dict.fromkeys(("commit", "ended"), (str, type(None))),
    "seconds": (int, float),
}


def read_record(folder: Path) -> list[Session]:
    """Sessions of a run from its run.json, in chronological order; empty without a file.

    Raises:
        ValueError: If the file is damaged or is not a record; names it.
    """
    path = folder / RUN_RECORD
    if not path.exists():
        return []
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"more than {_LARGEST:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        return [_session(one) for one in content["sessions"]]
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())[:100] or type(error).__name__
        raise ValueError(f"{path} is not the record of a run or is damaged ({said}): {_REMEDY}") from None


def write_record(folder: Path, sessions: Sequence[Session]) -> None:
    """Write all sessions atomically.

    Raises:
        OSError: If they cannot be written.
    """
    with written_aside(folder / RUN_RECORD) as aside:
        aside.write_text(json.dumps({"sessions": [asdict(one) for one in sessions]}, indent=2) + "\n", encoding="utf-8")


def now() -> str:
    """Date and time to the second, with the offset from UTC."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def command_of_process(words: Sequence[str] | None = None) -> str:
    """The command line that started this process, with secrets hidden.

    Args:
        words: Words after `mlssl`, if they may come from a program instead of the command line: if the process was not
            started with them, they are the command.
    """
    if words is not None and not set(words) <= set(sys.argv):
        return redacted(["mlssl", *words])
    program, *others = sys.orig_argv
    # A console script is started as `python /…/bin/mlssl`, but the user types `mlssl`.
    if others and Path(others[0]).is_absolute() and Path(others[0]).parent == Path(program).parent:
        program, *others = others
    return redacted([Path(program).name, *others])


def versions_of(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of the installed packages."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit_of(directory: str | os.PathLike[str]) -> tuple[str | None, int]:
    """Commit of the git repository that contains a directory, and the number of tracked files that differ from it.

    Returns:
        (None, 0) outside of a repository, without a commit, and if git is missing or slow.
    """
    try:
        commit = _git(directory, "rev-parse", "--verify", "HEAD").strip()
        changed = _git(directory, "status", "--porcelain", "--untracked-files=no").splitlines()
    except (OSError, subprocess.SubprocessError):
        return None, 0
    return commit, len(changed)


def _git(directory: str | os.PathLike[str], *words: str) -> str:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    command = ["git", "-C", os.fspath(directory), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=_GIT_SECONDS, check=True, env=environment
    )
    return done.stdout


def hardware_of(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads, memory and system of this machine, and the kind of device of a run."""
    found: dict[str, Any] = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "device": device.type,
    }
    if device.type == "cuda":
        of_device = torch.cuda.get_device_properties(device)
        found |= {"device": of_device.name, "device_memory_bytes": of_device.total_memory}
        found["cuda"] = torch.version.cuda or torch.version.hip
    return found


def _processor(listed: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = listed.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next((name for name in names if name), platform.processor() or platform.machine())


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # systems that do not report it
        return None


def _session(values: Mapping[str, Any]) -> Session:
    known = {name: values[name] for name in (one.name for one in fields(Session)) if name in values}
    wrong = next((name for name, value in known.items() if not _is_of_type(name, value)), None)
    if wrong is not None:
        raise ValueError(f"{wrong} is {known[wrong]!r:.60}")
    session = Session(**known)
    for moment in (session.started, session.ended):
        if moment is not None:
            datetime.fromisoformat(moment)
    return session


def _is_of_type(name: str, value: object) -> bool:
    if name in ("versions", "data"):
        inner = str if name == "versions" else dict
        return isinstance(value, dict) and all(isinstance(one, inner) for one in value.values())
    if isinstance(value, bool) or not isinstance(value, _TYPES[name]):
        return False
    return not isinstance(value, (int, float)) or (math.isfinite(value) and 0 <= value < 1e12)
