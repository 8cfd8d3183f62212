"""A home on a file system that became read-only, as ext4 does after an error of the disk: told, waited for.

A real file system, mounted anew; the worker is a stand-in.
"""

import shutil
import subprocess

import pytest

from daemon import part
from deploy.client import Client
from tests.daemon.running.conftest import QUICK, Bench, draw_class
from tests.daemon.running.programs import start_daemon

SIZE = 200 << 20


@pytest.fixture
def disk(mount_tmpfs):
    """A file system of its own, or a skip where none can be mounted."""
    return mount_tmpfs("disk", SIZE)


@pytest.fixture
def bench(disk, quick_home):
    """A started service whose home is on that file system."""
    shutil.move(quick_home, disk / "home")
    bench = Bench(disk / "home", QUICK)
    bench.service.start()
    yield bench
    remount(disk, "rw")
    bench.service.stop(lambda: True)


def remount(disk, how):
    """Make the file system read-only (ro) or writable (rw)."""
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def next_try(bench):
    """One iteration after all waits are over."""
    bench.now += part.TROUBLE_SECONDS_AT_MOST
    bench.service.reception.wake.set()
    bench.tick()


def test_a_home_that_becomes_read_only_is_told_and_waited_for(bench, disk):
    """Clients are served on; what was dropped before is learnt once the disk can be written again."""
    draw_class(bench.home / "inbox" / "cups")
    remount(disk, "ro")
    for _ in range(3):
        next_try(bench)
    with Client(bench.home / "serving") as client:
        assert client.version == 0

    assert "Read-only file system: " in bench.service.trouble
    assert str(bench.home) in bench.service.trouble
    assert bench.state() == {}
    remount(disk, "rw")
    next_try(bench)
    bench.run()
    assert (bench.store.current(), bench.service.trouble) == (1, None)
    assert len(bench.state()["done"]) == 1


def test_a_batch_at_work_when_the_home_becomes_read_only_is_published_afterwards(bench, disk):
    """The worker has ended, and its version waits for a disk that takes it."""
    bench.drop("cups")
    bench.tick_until(lambda: bench.service._lifecycle.working)
    bench.service._lifecycle._job.worker._process.wait(timeout=30)
    remount(disk, "ro")
    for _ in range(3):
        next_try(bench)

    assert "Read-only file system" in bench.service.trouble
    assert bench.store.current() == 0
    remount(disk, "rw")
    next_try(bench)
    bench.run()
    assert (bench.store.versions(), bench.service.trouble) == ([0, 1], None)
    [batch] = bench.state()["done"]
    assert len(bench.spool.load(batch).attempts) == 1


def test_a_daemon_started_on_a_read_only_home_names_it_and_ends(bench, disk):
    """One sentence, no traceback; a service manager tries again."""
    remount(disk, "ro")
    daemon = start_daemon(bench.home, once=True)
    _, said = daemon.communicate(timeout=60)

    assert daemon.returncode == 1
    assert "Error: Read-only file system: " in said
    assert str(bench.home) in said
    assert "Traceback" not in said


def test_a_second_daemon_on_a_home_names_the_first_and_ends(running, quick_home):
    """The first one goes on, and learns."""
    second = start_daemon(quick_home)
    _, said = second.communicate(timeout=60)

    assert second.returncode == 1
    assert f"{quick_home} is already used by the process with pid {running.pid}" in said
    assert "Stop that one first, or use another --home" in said
    assert running.poll() is None
