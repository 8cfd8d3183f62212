"""How many CPUs this process may use: its cpuset, and the quota of the containers it runs in.

ONNX Runtime, left to itself, counts the machine's cores. In a container that may use two of sixty-four it
would then start sixty-four threads, and pin them to cores it does not have.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUP_FILE = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def usable_cpus(*, cgroup_file: Path = _CGROUP_FILE, cgroup_root: Path = _CGROUP_ROOT) -> int:
    """Return how many CPUs' worth of time this process may use, rounded up; at least 1."""
    allowed = float(len(os.sched_getaffinity(0)))
    for quota in _quotas(cgroup_file, cgroup_root):
        allowed = min(allowed, quota)
    return max(1, math.ceil(allowed))


def _quotas(cgroup_file: Path, cgroup_root: Path) -> Iterator[float]:
    """Yield the quotas, in CPUs, of our control group and of those above it that have one."""
    try:
        lines = cgroup_file.read_text().splitlines()
    except OSError:
        return  # no control groups on this machine
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = cgroup_root / "cpu" if controllers else cgroup_root
        # In a container the path may be the host's, of which only the root is seen here.
        group = base / path.strip("/")
        for directory in (group, *group.parents):
            quota = _quota_v1(directory) if controllers else _quota_v2(directory)
            if quota is not None:
                yield quota
            if directory == base:
                break


def _quota_v2(directory: Path) -> float | None:
    """cpu.max: `max 100000` or microseconds per period."""
    try:
        quota, period = (directory / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(directory: Path) -> float | None:
    """cpu.cfs_quota_us, -1 where there is none, and cpu.cfs_period_us."""
    try:
        quota = int((directory / "cpu.cfs_quota_us").read_text())
        period = int((directory / "cpu.cfs_period_us").read_text())
        return None if quota <= 0 else quota / period
    except (OSError, ValueError, ZeroDivisionError):
        return None
