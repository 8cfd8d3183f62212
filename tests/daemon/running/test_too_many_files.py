"""A daemon that may open no more files stays up, says so, and goes on when it may again."""

import itertools
import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

from daemon.spool import Spool
from tests.daemon.running.conftest import draw_class
from tests.daemon.running.programs import start_daemon, wait_until

SENTENCE = "too many files are open (Too many open files: "
WHAT_TO_DO = "); allow the daemon more (LimitNOFILE=, ulimit -n)"


def next_descriptor(pid):
    """The lowest that a process has free, in many looks: what it opens for a moment comes and goes."""
    looks = [{int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()} for _ in range(200)]
    return next(number for number in itertools.count() if number not in set.intersection(*looks))


@contextmanager
def no_more_files(pid, free):
    """Meanwhile a process may not open descriptor `free`, nor any beyond."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def test_every_part_of_a_daemon_waits_while_it_may_open_no_more_files(bench):
    """What it says of itself fails, too, and ends nothing; the drop is learnt afterwards."""
    bench.drop("cups")
    os.close(free := os.open(os.devnull, os.O_RDONLY))
    with no_more_files(os.getpid(), free):
        for _ in range(3):
            bench.service.tick(bench.now)
        trouble, summary = bench.service.trouble, bench.service.summary

    assert SENTENCE in trouble
    assert WHAT_TO_DO in trouble
    assert summary.startswith(f"waiting: {SENTENCE}")
    bench.now += 11
    bench.run()
    assert bench.state() == {"done": ["000001-cups"]}
    assert bench.service.trouble is None


@pytest.mark.nightly
def test_a_daemon_that_may_open_no_more_files_does_not_end(quick_home, tmp_path):
    """The same for the real program: nobody has to start it again."""
    log = tmp_path / "log"
    with log.open("w") as file:
        daemon = start_daemon(quick_home, log=file)
    try:
        wait_until((quick_home / "status.json").exists)
        with no_more_files(daemon.pid, next_descriptor(daemon.pid)):
            draw_class(quick_home / "inbox" / "cups")
            wait_until(lambda: "ERROR trouble" in log.read_text() or daemon.poll() is not None)
        wait_until(lambda: Spool(quick_home).ids("done") or daemon.poll() is not None, seconds=60)
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(30) == 0, log.read_text()
    finally:
        daemon.kill()
        daemon.communicate()

    assert Spool(quick_home).ids("done") == ["000001-cups"]
    assert SENTENCE in log.read_text()
    assert "Traceback" not in log.read_text()
