"""Paused, outside the window, the day's share done: batches queue, everybody is told why, nothing is lost."""

import json
from datetime import datetime, timedelta

import pytest

from daemon.config import ScheduleConfig
from daemon.events import EventLog
from daemon.rest import Pause, read_pause, write_pause
from daemon.status import read_status, snapshot
from tests.daemon.running.conftest import QUICK, Bench, draw_class
from tests.daemon.running.programs import behave, start_daemon, wait_until


@pytest.fixture
def scheduled(home):
    """A function that starts a service with a schedule; the clock stands at noon of a Monday."""
    started = []

    def start(**schedule):
        bench = Bench(home, QUICK.model_copy(update={"schedule": ScheduleConfig(**schedule)}))
        bench.now = noon().timestamp()
        bench.service.start()
        started.append(bench)
        return bench

    yield start
    for bench in started:
        bench.service.stop(lambda: True)


def noon():
    """Today at noon, which is after every file of the test was made or soon is."""
    return datetime.now().replace(hour=12, minute=0, second=0, microsecond=0)  # noqa: DTZ005 - wall clock


def test_a_paused_daemon_takes_in_and_queues_and_says_why(bench):
    """Until the pause is over; then nothing has to be dropped again."""
    write_pause(bench.home, Pause(who="ann", why="benchmarks"))
    bench.drop("cups")
    bench.run()
    [batch_id] = bench.spool.ids("queued")
    status = read_status(bench.home)

    assert bench.store.current() == 0
    assert status["state"] == "paused"
    assert status["rests"]["why"] == "paused by ann (benchmarks); `dynlora resume` goes on"
    assert bench.service.summary.startswith("1 batches queued; paused by ann")
    assert snapshot(bench.home)["rests"]["reason"] == "paused"

    (bench.home / "paused.json").unlink()
    bench.run()
    assert bench.state() == {"done": [batch_id]}
    assert read_status(bench.home)["rests"] is None


def test_a_batch_at_work_stops_at_a_checkpoint_when_a_pause_comes_and_goes_on_from_it(bench):
    """The attempt does not count as failed, and the steps are not done twice."""
    bench.behave(steps=200, step_seconds=0.02)
    bench.drop("cups")
    bench.tick_until(lambda: (bench.service._lifecycle.working or {}).get("step", 0) > 3)
    write_pause(bench.home, Pause(who="ann"))
    bench.run()

    [batch_id] = bench.spool.ids("work")
    checkpoint = bench.spool.path(batch_id) / "checkpoint" / "checkpoint.safetensors"
    done = int(checkpoint.read_text())
    assert done > 3
    assert bench.spool.load(batch_id).attempts[-1].outcome.startswith("restarted: paused by ann")

    bench.behave(steps=done + 2)
    (bench.home / "paused.json").unlink()
    bench.run()
    assert bench.store.current() == 1


def test_a_pause_that_cannot_be_read_is_a_pause(bench):
    """Someone wanted it; what is damaged must not start learning by itself."""
    (bench.home / "paused.json").write_text("{")
    bench.drop("cups")
    bench.run()

    assert len(bench.spool.ids("queued")) == 1
    assert "paused.json cannot be read" in bench.service.why_rest


def test_outside_the_window_batches_queue_and_within_it_they_are_learnt(scheduled):
    """Nights only: at noon it waits and says until when; at eleven in the evening it goes on."""
    bench = scheduled(windows=["22:00-06:00"])
    bench.drop("cups")
    bench.run()
    rests = read_status(bench.home)["rests"]

    assert read_status(bench.home)["state"] == "resting"
    assert bench.spool.ids("queued")
    assert rests["why"].startswith("outside the training windows (22:00-06:00); goes on at ")
    assert rests["why"].endswith("22:00")
    assert datetime.fromtimestamp(rests["until"]) == noon().replace(hour=22)  # noqa: DTZ006 - wall clock

    bench.now += timedelta(hours=11).total_seconds()
    bench.run()
    assert bench.store.current() == 1


def test_a_batch_at_work_stops_at_a_checkpoint_when_the_window_closes(scheduled):
    """In the morning the CPU is free for others."""
    bench = scheduled(windows=["09:00-13:00"])
    bench.behave(steps=500, step_seconds=0.02)
    bench.drop("cups")
    bench.tick_until(lambda: (bench.service._lifecycle.working or {}).get("step", 0) > 3)
    bench.now += 3600
    bench.run()

    [batch_id] = bench.spool.ids("work")
    assert bench.service._lifecycle.working is None
    assert "restarted: outside the training windows" in bench.spool.load(batch_id).attempts[-1].outcome


def test_no_more_versions_a_day_than_allowed_and_the_rest_tomorrow(scheduled):
    """Two drops, one version a day: the second waits until midnight has passed."""
    bench = scheduled(max_versions_per_day=1)
    bench.drop("cups")
    bench.run()
    bench.drop("plates")
    bench.run()

    assert bench.store.current() == 1
    assert len(bench.spool.ids("queued")) == 1
    assert "1 versions were published today" in bench.service.why_rest

    bench.now += timedelta(hours=13).total_seconds()
    bench.run()
    assert bench.store.current() == 2


def test_pause_and_resume_reach_a_running_daemon(quick_home, dynlora, running):
    """By the command line: told in events.jsonl with who and why; a drop meanwhile is learnt afterwards."""
    code, out, _ = dynlora("pause", "--home", quick_home, "--why", "maintenance")
    assert (code, out) == (0, "paused; what is dropped queues until `dynlora resume`\n")
    draw_class(quick_home / "inbox" / "cups")
    wait_until(lambda: list((quick_home / "spool" / "queued").iterdir()))
    _, out, _ = dynlora("status", "--home", quick_home)
    assert "(maintenance); `dynlora resume` goes on" in out
    assert "queued    000001-cups" in out

    code, out, _ = dynlora("resume", "--home", quick_home)
    assert (code, out) == (0, "learning goes on\n")
    wait_until((quick_home / "serving" / "versions" / "1").exists)
    events = [e for e in EventLog(quick_home).read() if e["event"] in ("paused", "resumed")]
    assert [e["event"] for e in events] == ["paused", "resumed"]
    assert events[0]["why"] == "maintenance"


def test_a_pause_without_a_daemon_holds_for_the_next_one(quick_home, dynlora):
    """`run --once` says why it learns nothing, and ends."""
    assert dynlora("pause", "--home", quick_home)[0] == 0
    assert read_pause(quick_home) is not None
    behave(quick_home)
    draw_class(quick_home / "inbox" / "cups")
    out, _ = start_daemon(quick_home, once=True).communicate(timeout=60)
    assert out.startswith("paused by ")
    assert json.loads(dynlora("status", "--json", "--home", quick_home)[1])["rests"]["reason"] == "paused"

    assert dynlora("resume", "--home", quick_home)[1] == "learning goes on\n"
    assert dynlora("resume", "--home", quick_home)[1] == "nothing was paused\n"
