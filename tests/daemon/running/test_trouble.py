"""What fails is tried again, put aside with a reason, and never blocks what comes after it."""

import errno
import json
import signal

import pytest

from daemon import part, requests
from daemon.requests import Request
from deploy import atomic
from deploy.errors import StoreError


def test_a_failing_batch_is_tried_again_later_then_put_aside_and_never_blocks_the_next(bench):
    """Three attempts with growing waits; meanwhile another batch is published."""
    bench.drop("cups")
    bench.tick_until(lambda: bench.spool.ids("queued") or bench.spool.ids("work"))
    [bad] = bench.spool.ids("queued") or bench.spool.ids("work")
    bench.behave(fail="the images are cursed", only=[bad])
    bench.drop("plates")
    bench.tick_until(lambda: bench.store.current() == 1)
    assert bench.spool.find(bad) == "queued"
    started = [attempt.started_at for attempt in bench.spool.load(bad).attempts]
    assert len(started) == 1

    bench.now += 11  # the first wait is 10 s, the second one 20 s
    bench.tick_until(
        lambda: len(bench.spool.load(bad).attempts) == 2 and not bench.service._lifecycle.working
    )
    bench.now += 11
    for _ in range(5):
        bench.tick()
    assert len(bench.spool.load(bad).attempts) == 2
    bench.now += 11
    bench.tick_until(lambda: bench.spool.find(bad) == "failed")

    reason = bench.spool.reason(bad)
    assert reason.reason == "3 of 3 attempts failed; the last one: the images are cursed"
    assert len(reason.details) == 3
    assert len(bench.spool.load(bad).images) == len(list((bench.spool.path(bad) / "images").rglob("*.png")))
    assert bench.events().count("attempt_failed") == 2
    assert bench.service.is_idle()


def test_what_cannot_get_better_is_not_tried_again(bench):
    """The worker says retry: false, so one attempt is enough."""
    bench.behave(fail="no class has two images", retry=False)
    bench.drop("cups")
    bench.run()

    [batch_id] = bench.spool.ids("failed")
    assert bench.spool.reason(batch_id).reason == "no class has two images"
    assert len(bench.spool.load(batch_id).attempts) == 1


def test_a_fault_of_the_home_is_no_fault_of_the_batch(bench):
    """A typo in the configuration keeps the queue where it is, told once; with it mended all goes on."""
    bench.behave(fail="[learning] steps must be a number", fault="home")
    bench.drop("cups")
    for wait in (1, 2, 4, 8):  # times the first wait: no worker is started again and again for nothing
        bench.tick_until(lambda: bench.service.trouble)
        started = bench.events().count("adapting")
        bench.now += wait * part.TROUBLE_SECONDS - 0.1
        bench.tick()
        assert bench.events().count("adapting") == started
        bench.now += 0.1
        bench.tick()
        assert bench.events().count("adapting") == started + 1
    bench.tick_until(lambda: bench.service.trouble)
    [batch_id] = bench.spool.ids("work")
    [attempt] = bench.spool.load(batch_id).attempts

    assert bench.service.trouble == "[learning] steps must be a number"
    assert attempt.outcome == "restarted: [learning] steps must be a number"
    assert not {"attempt_failed", "failed"} & set(bench.events())

    bench.behave()
    bench.now += part.TROUBLE_SECONDS_AT_MOST
    bench.tick_until(lambda: bench.store.current() == 1)


@pytest.fixture
def broken_off(bench, monkeypatch):
    """A service whose publication of version 1 broke off before `current` was pointed at it."""
    rename, broken = atomic.rename, []

    def refuse_once(source, target):
        if target.name == "current" and not broken:
            broken.append(target)
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr("deploy.store.atomic.rename", refuse_once)
    bench.drop("cups")
    bench.tick_until(lambda: bench.service.trouble)
    return bench


def test_a_publication_that_broke_off_before_current_is_completed(broken_off):
    """The version has its number already: it goes live at the next try, and is learnt once only."""
    bench = broken_off
    assert "version 1 is complete, but `current` could not be pointed at it" in bench.service.trouble
    assert (bench.store.current(), bench.store.versions()) == (0, [0, 1])
    bench.now += part.TROUBLE_SECONDS
    bench.run()

    assert (bench.store.current(), bench.store.versions()) == (1, [0, 1])
    assert len(bench.spool.ids("done")) == 1
    assert bench.events().count("published") == bench.events().count("adapting") == 1


def test_a_roll_back_wins_over_a_publication_that_broke_off(broken_off):
    """The batch is done, as one is that was rolled back; nothing says that its version is live."""
    bench = broken_off
    requests.leave(bench.home, Request(command="rollback", to=0, why="no"))
    bench.tick()
    requests.leave(bench.home, Request(command="unpin"))
    bench.tick()
    bench.run()
    [batch_id] = bench.spool.ids("done")
    [outcome] = bench.service.outcomes

    assert (bench.store.current(), bench.store.versions()) == (0, [0, 1])
    assert (outcome["event"], outcome["version"], outcome["live"]) == ("published", 1, 0)
    last = bench.spool.load(batch_id).attempts[-1]
    assert last.outcome == "published as version 1, but version 0 was made live"


def test_a_worker_killed_from_outside_counts_as_a_failed_attempt_and_keeps_its_checkpoint(bench):
    """Out of memory: the next attempt goes on where this one was, and says why the last one ended."""
    bench.behave(steps=3, die=signal.SIGKILL)
    bench.drop("cups")
    bench.tick_until(lambda: "attempt_failed" in bench.events())
    [batch_id] = bench.spool.ids("queued")
    [attempt] = bench.spool.load(batch_id).attempts

    assert "killed by SIGKILL (often: out of memory)" in attempt.outcome
    assert (bench.spool.path(batch_id) / "checkpoint" / "checkpoint.safetensors").read_text() == "3"


def test_a_worker_that_ends_well_without_a_report_has_failed(bench):
    """Nothing is published on an exit code alone."""
    bench.behave(silent=True)
    bench.drop("cups")
    bench.tick_until(lambda: "attempt_failed" in bench.events())

    assert bench.store.current() == 0
    [batch_id] = bench.spool.ids("queued")
    assert "no readable report" in bench.spool.load(batch_id).attempts[0].outcome


def test_weights_cut_short_in_staging_are_never_published(bench):
    """The store reads every file again; the attempt fails, the next one makes a good version."""
    bench.behave(torn=True)
    bench.drop("cups")
    bench.tick_until(lambda: "attempt_failed" in bench.events())
    [batch_id] = bench.spool.ids("queued")
    assert bench.store.current() == 0
    assert "weights.safetensors" in bench.spool.load(batch_id).attempts[0].outcome

    bench.behave()
    bench.now += 11
    bench.tick_until(lambda: bench.store.current() == 1)


def test_too_little_disk_space_keeps_the_batch_waiting_and_says_so(bench, monkeypatch):
    """Nothing is started that cannot be finished; the batch goes on once there is space."""
    monkeypatch.setattr("daemon.budget.free_bytes", lambda path: 1000)
    bench.drop("cups")
    bench.tick_until(lambda: bench.service.trouble)
    [batch_id] = bench.spool.ids("work")
    status = json.loads((bench.home / "status.json").read_text())

    assert "too full to learn" in status["trouble"]
    assert "1,000 are free on the file system of" in status["trouble"]
    assert bench.spool.load(batch_id).attempts == []

    monkeypatch.undo()
    bench.now += part.TROUBLE_SECONDS
    bench.tick_until(lambda: bench.store.current() == 1)


def test_an_inbox_that_cannot_be_read_stops_neither_the_worker_nor_publishing(bench):
    """The trouble is told; what was taken in before is learnt and goes live; then the inbox is back."""
    bench.behave(steps=20, step_seconds=0.02)
    bench.drop("cups")
    bench.tick_until(lambda: bench.service._lifecycle.working)
    inbox = bench.home / "inbox"
    inbox.rmdir()
    inbox.write_text("no folder")
    bench.service.reception.wake.set()
    bench.tick()
    assert "inbox" in bench.service.trouble
    assert json.loads((bench.home / "status.json").read_text())["state"] == "working"
    assert bench.service.why_stuck() is None
    bench.tick_until(lambda: bench.spool.ids("done"))

    assert bench.store.current() == 1
    assert "inbox" in bench.service.why_stuck()
    inbox.unlink()
    inbox.mkdir()
    bench.now += part.TROUBLE_SECONDS_AT_MOST
    bench.drop("plates")
    bench.run()
    assert (bench.store.current(), bench.service.trouble) == (2, None)


def test_a_damaged_batch_record_fails_that_batch_alone(bench):
    """The next one is learnt; the damaged one lies in failed/ with the reason."""
    directory = bench.spool.state_dir("queued") / "000007-odd"
    directory.mkdir()
    (directory / "batch.json").write_text("{ not json")
    bench.drop("cups")
    bench.run()

    assert bench.spool.ids("failed") == ["000007-odd"]
    assert "batch.json is damaged" in bench.spool.reason("000007-odd").reason
    assert bench.store.current() == 1


def test_a_current_that_points_nowhere_stops_the_start_with_what_to_do(bench):
    """No daemon works on a store whose live version is gone."""
    current = bench.home / "serving" / "current"
    current.unlink()
    current.symlink_to("versions/7")

    with pytest.raises(StoreError, match=r"versions/7.*dynlora rollback --to 0"):
        bench.new_service().start()
