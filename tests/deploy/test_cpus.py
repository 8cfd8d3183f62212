"""CPUs that may be used: cpuset and quota, both kinds of control groups, and containers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.cpus import usable_cpus

CPUS = len(os.sched_getaffinity(0))


def make(root: Path, files: dict[str, str], own: str) -> int:
    """Count CPUs under a tree of control groups that looks like the kernel's."""
    (root / "self").write_text(own)
    for name, content in files.items():
        path = root / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return usable_cpus(cgroup_file=root / "self", cgroup_root=root / "fs")


@pytest.mark.parametrize(
    ("files", "own", "expected"),
    [
        ({"a/b/cpu.max": "100000 100000"}, "0::/a/b\n", 1),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, "0::/a/b\n", 1),
        ({"cpu.max": "20000 100000"}, "0::/the/host/path\n", 1),
        ({"a/cpu.max": "max 100000"}, "0::/a\n", CPUS),
        ({"a/cpu.max": "6400000 100000"}, "0::/a\n", CPUS),
        ({"a/cpu.max": "nonsense"}, "0::/a\n", CPUS),
        (
            {"cpu/d/cpu.cfs_quota_us": "90000", "cpu/d/cpu.cfs_period_us": "100000"},
            "5:memory:/d\n4:cpu,cpuacct:/d\n",
            1,
        ),
        ({"cpu/d/cpu.cfs_quota_us": "-1", "cpu/d/cpu.cfs_period_us": "100000"}, "4:cpu:/d\n", CPUS),
    ],
)
def test_the_smallest_quota_counts(tmp_path: Path, files: dict[str, str], own: str, expected: int) -> None:
    """Of the own group and all above it; rounded up; none, or one that cannot be read, changes nothing."""
    assert make(tmp_path, files, own) == expected


def test_no_control_groups_leave_the_cpuset(tmp_path: Path) -> None:
    """Other kernels have other files."""
    assert usable_cpus(cgroup_file=tmp_path / "none", cgroup_root=tmp_path) == CPUS


def test_a_process_that_is_kept_to_one_cpu_counts_one() -> None:
    """What docker's --cpuset-cpus does, and taskset."""
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from deploy.cpus import usable_cpus; print(usable_cpus())"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True)
    assert int(done.stdout) == 1
