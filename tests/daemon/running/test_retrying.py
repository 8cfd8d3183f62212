"""Batches that failed or were held: tried again, or given up for good."""

import json
import os
import time

import pytest

from daemon import requests
from daemon.batch import Attempt
from daemon.requests import Request
from tests.daemon.running.conftest import QUICK, draw_class
from tests.daemon.running.tiny_home import TinyHome, batch_name


@pytest.fixture
def tiny(tmp_path):
    """A daemon on a home of versions 0 and 1."""
    tiny = TinyHome(tmp_path / "home")
    tiny.create(1)
    tiny.start()
    yield tiny
    tiny.service.stop(lambda: True)


def order(home, command, batch, why=""):
    """Through the daemon that `home` ticks."""
    name = requests.leave(home.home, Request(command=command, batch=batch, who="ann", why=why))
    deadline = time.monotonic() + 30
    while (answer := requests.take_answer(home.home, name)) is None:
        assert time.monotonic() < deadline
        home.tick()
    return answer


def pictures(bench, batch):
    """The images that are left of a batch."""
    return [path for path in bench.spool.path(batch).rglob("*") if path.suffix == ".png"]


def test_a_failed_batch_that_is_retried_is_learnt_with_its_attempts_cleared(bench):
    """Three attempts fail; the cause is mended; it is published at once."""
    bench.behave(fail="the disk has a bad sector", retry=False)
    bench.drop("cups")
    bench.run()
    [batch] = bench.spool.ids("failed")
    bench.behave()

    assert order(bench, "retry", batch).result == {"batch": batch, "state": "queued"}
    assert bench.spool.load(batch).attempts == [] or bench.spool.find(batch) != "queued"
    bench.run()

    assert bench.state() == {"done": [batch]}
    assert [attempt.n for attempt in bench.spool.load(batch).attempts] == [1]
    assert not (bench.spool.path(batch) / "reason.json").exists()
    assert bench.store.current() == 1
    assert "retried" in bench.events()


def test_a_held_batch_that_is_retried_is_learnt_on_the_live_version(bench):
    """Nothing of the first candidate is left."""
    bench.behave(exams=[[40, 10, 0, 0]])
    bench.drop("cups")
    bench.run()
    [batch] = bench.spool.ids("held")
    bench.behave()

    order(bench, "retry", batch)
    bench.run()

    assert bench.state() == {"done": [batch]}
    assert bench.store.published_batches()[batch].version == 1


def test_a_batch_that_waits_for_its_next_attempt_is_tried_at_once(bench):
    """The back-off is ten minutes here and nobody waits for it."""
    bench.config = QUICK.model_copy(
        update={"attempts": QUICK.attempts.model_copy(update={"backoff_seconds": 600})}
    )
    bench.new_service().start()
    bench.behave(fail="no luck")
    bench.drop("cups")
    bench.tick_until(lambda: "attempt_failed" in bench.events())
    [batch] = bench.spool.ids("queued")
    bench.behave()

    assert order(bench, "retry", batch).exit_code == 0
    bench.tick_until(lambda: bench.state() == {"done": [batch]})


def test_a_drop_that_was_never_taken_in_is_read_again_by_the_configuration_of_now(bench):
    """Too few images before, enough now."""
    draw_class(bench.home / "inbox" / "cups", count=2)
    bench.run()
    [batch] = bench.spool.ids("failed")
    assert "cups" in bench.spool.reason(batch).reason
    inbox = bench.config.inbox.model_copy(update={"min_images_per_class": 2})
    bench.service.reconfigure(bench.config.model_copy(update={"inbox": inbox}))

    assert order(bench, "retry", batch).result["state"] == "incoming"
    bench.run()

    assert bench.state() == {"done": [batch]}
    assert len(bench.spool.load(batch).images) == 2


@pytest.mark.parametrize("state", ["failed", "held", "queued"])
def test_a_discarded_batch_keeps_who_when_and_why_and_no_image(tiny, state):
    """From each state it may be discarded from; asked twice, the same holds."""
    (tiny.store.serving_dir / "pin.json").unlink(missing_ok=True)
    tiny.store.roll_back(1, who="ann", why="nothing is learnt meanwhile")
    batch = tiny.add(state, 3)

    for _ in range(2):
        answer = order(tiny, "discard", batch, why="wrong labels")
        assert (answer.exit_code, answer.result["state"]) == (0, "failed")

    reason = tiny.spool.reason(batch)
    assert reason.reason == "discarded by ann: wrong labels"
    assert reason.forgotten.who == "ann"
    assert reason.failed_at == reason.forgotten.at
    assert pictures(tiny, batch) == []
    assert tiny.spool.load(batch).forgotten == reason.forgotten
    assert not (tiny.spool.path(batch) / "result").exists()
    refused = order(tiny, "retry", batch)
    assert f"the images of {batch} were removed" in refused.error


@pytest.mark.parametrize("command", ["retry", "discard"])
@pytest.mark.parametrize(
    ("state", "sentence"),
    [("work", "is being learnt"), ("done", "is done with"), (None, "there is no batch")],
)
def test_batches_that_are_not_settled_are_left_alone(tiny, command, state, sentence):
    """What cannot be done is said, and nothing moves."""
    tiny.store.roll_back(1, who="ann", why="nothing is learnt meanwhile")
    batch = tiny.add(state, 3) if state else batch_name(9)

    answer = order(tiny, command, batch)

    assert answer.exit_code == 1
    assert sentence in answer.error
    assert tiny.spool.find(batch) == state


@pytest.mark.parametrize("command", ["retry", "discard"])
def test_a_published_batch_is_neither_retried_nor_discarded(tiny, command):
    """It names what takes it out."""
    answer = order(tiny, command, batch_name(1))
    assert answer.exit_code == 1
    assert f"`dynlora revert {batch_name(1)}`" in answer.error


@pytest.mark.parametrize("command", ["forget", "discard"])
def test_a_drop_that_failed_at_the_door_leaves_no_image_and_no_file_name(bench, command):
    """It has no record; reason.json says on whose word, and names nothing the sender named."""
    (bench.home / "inbox" / "aunt-mary.zip").write_bytes(b"no archive")
    bench.run()
    [batch] = bench.spool.ids("failed")
    directory = bench.spool.path(batch)
    assert not (directory / "batch.json").exists()
    assert "aunt-mary.zip" in (directory / "reason.json").read_text()

    answer = order(bench, command, batch, why="private")

    assert (answer.exit_code, answer.result["images"]["spool"]) == (0, 2)  # the drop and its claim
    assert [path.name for path in directory.iterdir()] == ["reason.json"]
    assert ".zip" not in (directory / "reason.json").read_text()
    assert bench.spool.reason(batch).forgotten.why == "private"
    assert order(bench, command, batch).result["images"]["spool"] == 0


def test_the_reason_of_a_failed_drop_names_no_file_after_it_was_forgotten(bench):
    """Its record exists, for every image was looked at."""
    draw_class(bench.home / "inbox" / "cups", count=5)
    for path in (bench.home / "inbox" / "cups").iterdir():
        path.write_bytes(b"no image")
        path.rename(path.with_name(f"secret-{path.name}"))
    bench.run()
    [batch] = bench.spool.ids("failed")
    path = bench.spool.path(batch) / "reason.json"
    assert "secret-" in path.read_text()

    order(bench, "forget", batch)

    assert "secret-" not in path.read_text()
    assert json.loads(path.read_text())["forgotten"]["who"] == "ann"


def test_no_exam_is_forgotten_while_an_operator_has_it_graded(tiny):
    """A revert grades the exams of all batches: the order has to wait."""
    held = tiny.add("held", 2)
    tiny.child = ["sleep", "300"]
    name = requests.leave(tiny.home, Request(command="promote", batch=held))
    while tiny.service._reviser.working is None:
        tiny.tick()

    answer = order(tiny, "forget", batch_name(1))

    assert answer.exit_code == 1
    assert answer.error == f"`promote {held}` is under way: forget {batch_name(1)} when that has ended"
    assert pictures(tiny, batch_name(1))
    requests.withdraw(tiny.home, name)


def test_an_exam_is_forgotten_while_a_version_is_rebuilt(tiny):
    """A rebuild reads versions and no exam: the order need not wait, and the rebuild goes on."""
    tiny.child = ["sleep", "300"]
    name = requests.leave(tiny.home, Request(command="rebuild", to=1))
    while tiny.service._reviser.working is None:
        tiny.tick()

    answer = order(tiny, "forget", batch_name(1))

    assert (answer.exit_code, answer.error) == (0, None)
    assert not pictures(tiny, batch_name(1))
    assert tiny.service._reviser.working["command"] == "rebuild"
    requests.withdraw(tiny.home, name)


def test_a_worker_that_hangs_is_killed_and_its_batch_tried_again(bench):
    """It says nothing: the attempt fails with that reason, and the next one is published."""

    def patience(seconds):
        learning = bench.config.learning.model_copy(update={"silent_seconds": seconds})
        bench.service.reconfigure(bench.config.model_copy(update={"learning": learning}))

    bench.behave(steps=1, step_seconds=300)
    bench.drop("cups")
    bench.tick_until(lambda: (bench.service._lifecycle.working or {}).get("phase") == "train")
    pid = bench.service._lifecycle._job.worker.pid
    patience(0.1)
    bench.tick_until(lambda: "attempt_failed" in bench.events())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    patience(60.0)
    bench.behave()
    bench.now += 11
    bench.run()

    [batch] = bench.spool.ids("done")
    outcomes = [attempt.outcome for attempt in bench.spool.load(batch).attempts]
    how = "(learning.silent_seconds) while in phase 'train', and was killed"
    assert outcomes == [f"failed: the worker said nothing for 0.1 seconds {how}", "published as version 1"]


def test_a_bad_batch_that_waits_does_not_block_the_next(bench):
    """The first fails and waits ten seconds; the second is published meanwhile."""
    bench.behave(fail="no luck", only=["000001-bad"])
    bench.drop("bad")
    bench.tick_until(lambda: "attempt_failed" in bench.events())
    bench.drop("good")
    bench.service.reception.wake.set()
    bench.tick_until(lambda: bench.spool.ids("done") == ["000002-good"])
    assert bench.state()["queued"] == ["000001-bad"]


def test_a_clock_set_back_by_a_year_holds_nothing_up(bench):
    """A batch waits for its next attempt, and another is dropped, when the clock jumps."""
    bench.behave(fail="no luck", only=["000001-bad"])
    bench.drop("bad")
    bench.tick_until(lambda: "attempt_failed" in bench.events())
    bench.behave()
    bench.now -= 365 * 86400
    bench.drop("good")
    bench.tick_until(lambda: bench.spool.ids("done") == ["000001-bad", "000002-good"])


def test_attempts_before_a_retry_do_not_count(tiny):
    """A batch on its last attempt has all of them again."""
    tiny.store.roll_back(1, who="ann", why="nothing is learnt meanwhile")
    batch = tiny.add("failed", 3)
    record = tiny.spool.load(batch)
    attempts = [Attempt(n=n, started_at="2026-01-01T00:00:00+00:00", outcome="failed: x") for n in (1, 2, 3)]
    tiny.spool.save(record.model_copy(update={"attempts": attempts}))

    order(tiny, "retry", batch)

    assert tiny.spool.load(batch).attempts == []
    assert tiny.spool.find(batch) == "queued"
