"""Memory available to a process: that of the machine, and within the limits of its job or container."""

from __future__ import annotations

from pathlib import Path


def free_memory_of_processor(root: Path = Path("/")) -> int | None:
    """Bytes that can still be allocated: MemAvailable, or less if a cgroup of this process has a limit.

    Args:
        root: Root of the file system.

    Returns:
        Bytes; None if the system does not report it, as outside Linux.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        (available,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return None
    free = [available]
    for group in groups:
        _, kinds, path = group.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top = root / ("sys/fs/cgroup/memory" if kinds else "sys/fs/cgroup")
        names = _VERSION_1 if kinds else _VERSION_2
        inner = Path(path.strip("/"))
        free += [left for one in (inner, *inner.parents) if (left := _left_in_group(top / one, *names)) is not None]
    return max(0, min(free))


_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
"""Files of a cgroup's limit and usage, and the entry of memory.stat for its reclaimable memory."""


def _left_in_group(folder: Path, limit: str, used: str, returned: str) -> int | None:
    try:
        most, now = ((folder / name).read_text().strip() for name in (limit, used))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return None if most == "max" else int(most) - int(now) + int(stat.get(returned, 0))
    except (OSError, ValueError):
        return None
