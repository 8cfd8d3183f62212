"""How much memory this process may still take: the machine's, and what its control groups leave of theirs."""

from collections.abc import Iterator
from pathlib import Path

_CGROUP_FILE = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def free_memory_bytes(
    *, cgroup_file: Path = _CGROUP_FILE, cgroup_root: Path = _CGROUP_ROOT, meminfo: Path = _MEMINFO
) -> int:
    """Return the least of what the machine has available and what each limit above us leaves.

    Limits are those of control groups of version 2: systemd's MemoryMax= and MemoryHigh=, a container's.
    """
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return max(0, min([available, *_left(cgroup_file, cgroup_root)]))


def resident_bytes() -> int:
    """Return what this process holds in memory now."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def _left(cgroup_file: Path, cgroup_root: Path) -> Iterator[int]:
    """Yield what is left of our control group's limit and of those above it that have one."""
    try:
        lines = cgroup_file.read_text().splitlines()
    except OSError:
        return  # no control groups on this machine
    paths = [line.split(":", 2)[2] for line in lines if line.startswith("0::")]
    for path in paths:
        # In a container the path may be the host's, of which only the root is seen here.
        group = cgroup_root / path.strip("/")
        for directory in (group, *group.parents):
            left = _left_in(directory)
            if left is not None:
                yield left
            if directory == cgroup_root:
                break


def _left_in(directory: Path) -> int | None:
    """Of memory.max and memory.high, above which a group is slowed down; None where neither is set.

    Files that were read and can be dropped do not count as taken.
    """
    limits = [
        limit for name in ("memory.max", "memory.high") if (limit := _limit(directory / name)) is not None
    ]
    if not limits:
        return None
    try:
        taken = int((directory / "memory.current").read_text())
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
        return min(limits) - taken + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return None


def _limit(path: Path) -> int | None:
    """A file of `max` or bytes."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
