"""A full disk at every stage, on a small file system: nothing is lost, and it goes on afterwards."""

import contextlib
import os
import shutil
import signal
import subprocess

import pytest

from daemon.budget import free_bytes
from deploy.verify import verify_version
from tests.e2e.conftest import Home, wait_until

SIZE = "320m"  # a version takes 43 MB; version 0, a candidate and its delta fit comfortably


@pytest.fixture
def small_home(initialised, tmp_path):
    """A home on a tmpfs of its own."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(mount)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"this system lets nobody mount a tmpfs here: {done.stderr.strip()}")
    shutil.copytree(initialised, mount / "home", symlinks=True)
    yield Home(mount / "home")
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def fill(home, leave_bytes=0):
    """Leave no more than so much space on the home's file system."""
    filler = home.path.parent / "filler"
    with filler.open("wb") as file, contextlib.suppress(OSError):  # ENOSPC: as full as it gets
        while free_bytes(home.path) > leave_bytes or not leave_bytes:
            file.write(bytes(1 << 20))
            file.flush()
    return filler


def check_it_goes_on(home):
    """With space again the batch is published, and every version is whole."""
    home.finish()
    assert home.store.current() == 1
    assert len(home.spool.ids("done")) == 1
    for version in home.store.versions():
        verify_version(home.store.path(version))


def test_a_submit_onto_a_full_disk_leaves_nothing_half_done(small_home, tmp_path):
    """The sentence says so, and the inbox is as it was."""
    filler = fill(small_home)
    (tmp_path / "shoes").mkdir()
    for number in range(5):
        (tmp_path / "shoes" / f"{number}.jpg").write_bytes(os.urandom(100_000))
    done = small_home.dynlora("submit", tmp_path / "shoes")

    assert done.returncode == 1
    assert "disk is full" in done.stderr
    assert list((small_home.path / "inbox").iterdir()) == []
    filler.unlink()


def test_too_little_space_for_a_new_version_is_noticed_before_learning(small_home):
    """Exit code 1 with the numbers; the batch waits where it is, no attempt is counted."""
    small_home.submit("shoes")
    filler = fill(small_home, leave_bytes=20_000_000)
    done = small_home.dynlora("run", "--once")

    assert done.returncode == 1
    assert "too full to learn" in done.stderr
    [batch_id] = small_home.spool.ids("work")
    assert small_home.spool.load(batch_id).attempts == []
    filler.unlink()
    check_it_goes_on(small_home)


@pytest.mark.nightly  # every day: with a stand-in for the worker, in daemon/running/test_full_disk
@pytest.mark.parametrize("moment", ["while it learns", "before it is published"])
def test_a_disk_that_fills_up_while_a_batch_is_worked_on_costs_time_and_nothing_else(small_home, moment):
    """Whatever stops it says why; the live version stays whole; afterwards the batch is learnt."""
    small_home.submit("shoes")
    daemon = small_home.start(once=False)
    wait_until(lambda: (small_home.status().get("working") or {}).get("phase") == "train", why=small_home.log)
    if moment == "before it is published":  # the daemon sleeps until the worker has left its report
        daemon.send_signal(signal.SIGSTOP)
        work = small_home.path / "spool" / "work"
        wait_until(lambda: list(work.glob("*/result/report.json")), why=small_home.log)
    filler = fill(small_home)
    daemon.send_signal(signal.SIGCONT)
    wait_until(
        lambda: (
            small_home.status().get("trouble") or "trouble" in small_home.log() or daemon.poll() is not None
        ),
        why=small_home.log,
    )
    assert "No space left" in small_home.log() or "too full" in small_home.log()
    assert daemon.poll() is None
    live = small_home.store.current()
    assert live == 0 or moment == "before it is published"
    verify_version(small_home.store.path(live))
    filler.unlink()
    daemon.terminate()
    daemon.wait(60)
    check_it_goes_on(small_home)
