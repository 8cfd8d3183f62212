"""One process at a time changes a home."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from daemon.errors import LockError
from daemon.lock import HomeLock, holder

ROOT = Path(__file__).resolve().parents[2]
HOLD = (
    "import sys, time; from pathlib import Path; from daemon.lock import HomeLock;"
    "HomeLock(Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def other_process(tmp_path):
    """A second process that holds the lock of tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_holder_is_told_the_pid_of_the_first(tmp_path, other_process):
    """The refusal is one sentence that names the process to stop."""
    with pytest.raises(LockError, match=f"pid {other_process.pid}.*Stop that one first"):
        HomeLock(tmp_path, patience_seconds=0.1).acquire()

    assert holder(tmp_path) == other_process.pid


def test_a_killed_holder_leaves_no_lock_behind(tmp_path, other_process):
    """The kernel gives the lock back; nothing is to be cleaned up."""
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()

    assert holder(tmp_path) is None
    with HomeLock(tmp_path, patience_seconds=0.0):
        assert (tmp_path / "daemon.lock").read_text() == f"{os.getpid()}\n"


def test_a_child_process_does_not_inherit_the_lock(tmp_path):
    """A worker that outlives its daemon must not keep the next daemon out."""
    with HomeLock(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        deadline = time.monotonic() + 5  # the kernel resumes us just before it closes the child's files
        while holder(tmp_path) is not None:
            assert time.monotonic() < deadline
        assert child.poll() is None
    finally:
        child.communicate(b"\n")


def test_a_home_that_nobody_uses_has_no_holder(tmp_path):
    """Neither before the first daemon nor after the last."""
    assert holder(tmp_path) is None
    with HomeLock(tmp_path):
        assert holder(tmp_path) == os.getpid()
    assert holder(tmp_path) is None
