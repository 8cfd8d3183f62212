"""A disk that is full at the moment somebody needs it: told, waited for, and nothing lost or done twice.

Real file systems of a size that fills up; the worker is a stand-in.
"""

import os
import shutil

import pytest

from daemon import part, requests
from daemon.exams import load_exams
from daemon.requests import Request
from tests.daemon.running.conftest import QUICK, Bench

SIZE = 200 << 20  # a version takes 43 MB, and learning wants twice that to be free


class SmallDisk:
    """The file system that a home lies on."""

    def __init__(self, path):
        self.path = path

    def fill(self, free_pages=0):
        """Leave so much and no more."""
        self.empty()
        state = os.statvfs(self.path)
        with (self.path / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, (state.f_bavail - free_pages) * state.f_frsize)

    def empty(self):
        """Take the filling away."""
        (self.path / "filler").unlink(missing_ok=True)


@pytest.fixture
def disk(mount_tmpfs):
    """A small file system, or a skip where none can be mounted."""
    return SmallDisk(mount_tmpfs("small", SIZE))


@pytest.fixture
def bench(disk, home):
    """A started service whose home is on the small disk."""
    shutil.move(home, disk.path / "home")
    bench = Bench(disk.path / "home", QUICK)
    bench.service.start()
    yield bench
    disk.empty()
    bench.service.stop(lambda: True)


def next_try(bench):
    """One iteration after all waits are over."""
    bench.now += part.TROUBLE_SECONDS_AT_MOST
    bench.tick()


def kill_daemon(bench):
    """As SIGKILL to the daemon: its worker dies with it, nobody writes anything any more."""
    job, bench.service._lifecycle._job = bench.service._lifecycle._job, None
    job.worker.kill()


def test_a_daemon_that_starts_on_a_full_disk_stays_up_and_goes_on_when_there_is_space(bench, disk):
    """The attempt of its predecessor cannot be marked: it says so and where the batch is, then goes on."""
    bench.behave(steps=1000, step_seconds=0.02)
    bench.drop("cups")
    bench.tick_until(lambda: (bench.service._lifecycle.working or {}).get("step", 0) > 2)
    [batch_id] = bench.spool.ids("work")
    kill_daemon(bench)
    (bench.home / "events.jsonl").unlink()  # all of them are missing now
    disk.fill()
    bench.new_service().start()
    bench.tick()

    assert "the disk is full" in bench.service.trouble
    assert f"{batch_id} waits in {bench.home / 'spool' / 'work'}" in bench.service.trouble
    assert bench.service.why_stuck() == bench.service.trouble
    disk.empty()
    bench.behave()
    next_try(bench)
    bench.run()
    assert (bench.store.current(), bench.service.trouble) == (1, None)
    assert bench.spool.load(batch_id).attempts[0].outcome == "interrupted"
    bench.new_service().start()
    assert {"initialised", "published"} <= set(bench.events())


@pytest.mark.parametrize(
    ("exams", "state", "versions"),
    [([[40, 10, 20, 0]], "done", [0, 1]), ([[40, 10, 0, 0]], "held", [0])],
    ids=["published", "held"],
)
def test_a_full_disk_at_any_stage_between_report_and_end_costs_time_only(bench, disk, exams, state, versions):
    """One page more each time: publishing, keeping the exam, holding; told every time, done once."""
    bench.behave(exams=exams)
    bench.drop("cups")
    bench.tick_until(lambda: bench.service._lifecycle.working)
    bench.service._lifecycle._job.worker._process.wait(timeout=30)
    [batch_id] = bench.spool.ids("work")
    rooms = 0
    while bench.spool.find(batch_id) == "work":
        disk.fill(free_pages=rooms)
        next_try(bench)
        if bench.spool.find(batch_id) == "work":
            assert "No space left" in bench.service.trouble
            assert bench.store.current() in versions
        rooms += 1
        assert rooms < 100
    disk.empty()
    next_try(bench)

    assert rooms > 1
    assert bench.state() == {state: [batch_id]}
    assert (bench.store.versions(), bench.store.current()) == (versions, versions[-1])
    assert len(bench.spool.load(batch_id).attempts) == 1
    assert len(list(load_exams(bench.home))) == len(versions) - 1
    bench.new_service().start()
    assert bench.events().count("published" if state == "done" else "held") == 1


def test_a_stop_on_a_full_disk_is_still_an_orderly_stop(bench, disk):
    """The attempt is marked at the next start instead."""
    bench.behave(steps=1000, step_seconds=0.02)
    bench.drop("cups")
    bench.tick_until(lambda: (bench.service._lifecycle.working or {}).get("step", 0) > 2)
    [batch_id] = bench.spool.ids("work")
    disk.fill()
    bench.service.stop()

    assert not (bench.home / "status.json").exists()
    disk.empty()
    bench.new_service().start()
    assert bench.spool.load(batch_id).attempts[0].outcome == "interrupted"


def test_a_request_on_a_full_disk_is_executed_once_and_answered_when_there_is_space(bench, disk):
    """The command that waits gets the outcome of the first execution, not that of a second one."""
    bench.drop("cups")
    bench.run()
    name = requests.leave(bench.home, Request(command="rollback", to=0))
    disk.fill(free_pages=1)  # enough for the pin and not for the answer
    for _ in range(3):
        next_try(bench)
        assert "the disk is full" in bench.service.trouble
        assert (bench.store.current(), bench.store.pin().version) == (0, 0)
    disk.empty()
    next_try(bench)

    answer = requests.take_answer(bench.home, name)
    assert (answer.exit_code, answer.result["before"]) == (0, 1)
    assert not list((bench.home / "requests").glob("*.json"))
    assert bench.service.trouble is None
