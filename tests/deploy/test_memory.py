"""Memory that may still be taken: the machine's, and what limits of control groups leave."""

import subprocess
import sys

import pytest

from deploy.memory import free_memory_bytes, resident_bytes

MACHINE = 8_000_000 * 1024  # bytes available, in the kernel's own words below


def _make(root, groups, own):
    (root / "self").write_text(own)
    (root / "meminfo").write_text("MemTotal:  16000000 kB\nMemAvailable:   8000000 kB\n")
    for name, (limit, taken, dropped) in groups.items():
        directory = root / "fs" / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "memory.max").write_text(f"{limit}\n")
        (directory / "memory.high").write_text("max\n")
        (directory / "memory.current").write_text(f"{taken}\n")
        (directory / "memory.stat").write_text(f"anon {taken}\ninactive_file {dropped}\n")
    return free_memory_bytes(
        cgroup_file=root / "self", cgroup_root=root / "fs", meminfo=root / "meminfo"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "own", "expected"),
    [
        ({}, "0::/\n", MACHINE),
        ({"a": ("max", 5, 0)}, "0::/a\n", MACHINE),
        ({"a": (1000, 600, 100)}, "0::/a\n", 500),
        ({"a": (1000, 600, 0), "a/b": ("max", 1, 0)}, "0::/a/b\n", 400),
        ({"": (1000, 200, 0)}, "0::/the/host/path\n", 800),
        ({"a": (1000, 1200, 0)}, "0::/a\n", 0),
        ({"a": (1 << 50, 0, 0)}, "0::/a\n", MACHINE),
        ({"a": ("nonsense", 0, 0)}, "0::/a\n", MACHINE),
    ],
)
def test_the_least_of_machine_and_limits_counts(tmp_path, groups, own, expected):
    """Files that were read and can be dropped again do not count as taken."""
    assert _make(tmp_path, groups, own) == expected


def test_a_limit_that_only_slows_a_group_down_counts_as_well(tmp_path):
    """Systemd's MemoryHigh=, which dynlora's own unit sets."""
    _make(tmp_path, {"a": (1000, 300, 0)}, "0::/a\n")
    (tmp_path / "fs" / "a" / "memory.high").write_text("700\n")

    assert free_memory_bytes(cgroup_file=tmp_path / "self", cgroup_root=tmp_path / "fs") == 400


def test_a_machine_without_control_groups_has_what_is_available(tmp_path):
    """The file that names the groups is missing."""
    _make(tmp_path, {}, "")
    found = free_memory_bytes(cgroup_file=tmp_path / "none", meminfo=tmp_path / "meminfo")

    assert found == MACHINE


def test_what_is_taken_is_held_and_no_longer_free_for_a_limit():
    """Of a real process that fills 50 MB."""
    program = (
        "from deploy.memory import free_memory_bytes, resident_bytes\n"
        "before = resident_bytes(); held = bytearray(50_000_000)\n"
        "print(resident_bytes() - before, free_memory_bytes())"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    taken, free = map(int, answer.stdout.split())

    assert 49_000_000 < taken < 60_000_000
    assert free > 0
    assert resident_bytes() > 0
