"""Pins, roll-backs, stops and starts while batches are on their way; what status and events say."""

import json
import os
import time

import pytest

from daemon import requests
from daemon.requests import Answer, Request
from daemon.status import snapshot


def test_a_pin_keeps_batches_queued_until_it_is_released(bench):
    """While pinned nothing is learnt and the status says so; then it goes on from the pinned version."""
    bench.drop("cups")
    bench.run()
    requests.leave(bench.home, Request(command="rollback", to=0, why="odd answers"))
    bench.drop("plates")
    bench.run()
    status = json.loads((bench.home / "status.json").read_text())

    assert bench.store.current() == 0
    assert [len(ids) for ids in bench.state().values()] == [1, 1]
    assert (status["state"], status["pin"]["why"], len(status["queued"])) == ("pinned", "odd answers", 1)

    requests.leave(bench.home, Request(command="unpin"))
    bench.tick()
    bench.run()
    manifest = bench.store.live_manifest()
    assert (manifest.version, manifest.parent) == (2, 0)
    assert bench.events()[-4:] == ["queued", "unpinned", "adapting", "published"]


def test_a_release_that_was_done_but_not_answered_is_done_once_and_answered_well(bench):
    """The daemon died between effect and answer; the request is still there at the next start."""
    bench.drop("cups")
    bench.run()
    bench.store.roll_back(to=0, who="ann", why="odd")
    name = requests.leave(bench.home, Request(command="unpin", to=0))
    request = bench.home / "requests" / f"{name}.json"
    content = request.read_bytes()
    bench.tick()
    request.write_bytes(content)
    bench.tick()

    assert requests.take_answer(bench.home, name) == Answer(exit_code=0, result={"unpinned": 0, "live": 0})
    assert bench.events().count("unpinned") == 1


def test_a_release_leaves_a_pin_alone_that_it_does_not_name(bench):
    """Somebody rolled back to another version meanwhile: that pin stands."""
    bench.drop("cups")
    bench.run()
    bench.store.roll_back(to=1, who="ann", why="odd")
    name = requests.leave(bench.home, Request(command="unpin", to=0))
    bench.tick()

    answer = requests.take_answer(bench.home, name)
    assert (answer.exit_code, bench.store.pin().version) == (1, 1)
    assert "version 1 is pinned now, by ann (odd)" in answer.error


def test_a_roll_back_that_cannot_be_recorded_is_still_one_that_happened(dynlora, home):
    """events.jsonl cannot be written: exit code 0, a warning, and the version is live."""
    (home / "events.jsonl").mkdir()
    code, out, err = dynlora("rollback", "--to", "0", "--home", home)
    assert (code, "version 0 is live and pinned" in out) == (0, True), err
    code, out, err = dynlora("unpin", "--home", home)
    assert (code, "released" in out) == (0, True), err
    code, _, err = dynlora("unpin", "--home", home)
    assert (code, "no version is pinned" in err) == (1, True)


def test_a_roll_back_while_a_batch_is_learnt_starts_it_over_from_the_new_parent(bench):
    """What was learnt on top of the version that is gone is thrown away, and the attempt does not count."""
    bench.drop("cups")
    bench.run()
    bench.behave(steps=1000, step_seconds=0.02)
    bench.drop("plates")
    bench.tick_until(lambda: (bench.service._lifecycle.working or {}).get("step", 0) > 2)
    [batch_id] = bench.spool.ids("work")

    name = requests.leave(bench.home, Request(command="rollback", to=0, why="odd"))
    bench.tick_until(lambda: bench.service._lifecycle.working is None)
    assert requests.take_answer(bench.home, name).result["live"] == 0
    assert "pinned" in bench.spool.load(batch_id).attempts[-1].outcome

    bench.behave(steps=20)
    requests.leave(bench.home, Request(command="unpin"))
    bench.tick_until(lambda: "step" in (bench.service._lifecycle.working or {}))
    assert "resumed_at" not in bench.service._lifecycle.working
    bench.run()
    manifest = bench.store.live_manifest()
    assert (manifest.version, manifest.parent, manifest.batch.id) == (2, 0, batch_id)
    assert [entry.batch for entry in manifest.lineage] == [batch_id]


def test_what_lies_unused_in_the_inbox_is_still_told_when_the_daemon_has_stopped(bench):
    """What the last daemon said, as long as it lies there; nothing of what was cleared away meanwhile."""
    for name in ("letter.txt", "list.txt", os.fsdecode(b"caf\xe9.txt")):
        (bench.home / "inbox" / name).write_text("loose")
    bench.run()
    running = snapshot_of(bench)
    bench.service.stop()
    (bench.home / "inbox" / "list.txt").unlink()

    assert len(running) == 3
    [sentence] = snapshot_of(bench)
    assert sentence.startswith("letter.txt lies loose in the inbox")
    assert sentence in running
    (bench.home / "inbox" / "letter.txt").unlink()
    assert snapshot_of(bench) == []


def snapshot_of(bench):
    """What is said of the inbox; the service of these tests holds no lock, which tells a daemon."""
    if (bench.home / "status.json").exists():
        return json.loads((bench.home / "status.json").read_text())["inbox"]
    return snapshot(bench.home)["inbox"]


def test_stopping_stops_the_worker_at_a_checkpoint_and_the_next_start_goes_on_from_it(bench):
    """SIGTERM to the worker, attempt marked as interrupted; nothing counts against the batch."""
    bench.behave(steps=200, step_seconds=0.01)
    bench.drop("cups")
    bench.tick_until(lambda: (bench.service._lifecycle.working or {}).get("step", 0) > 5)
    bench.service.stop()
    [batch_id] = bench.spool.ids("work")
    saved = int((bench.spool.path(batch_id) / "checkpoint" / "checkpoint.safetensors").read_text())

    assert bench.spool.load(batch_id).attempts[0].outcome == "interrupted"
    assert not (bench.home / "status.json").exists()

    bench.new_service().start()
    bench.tick_until(lambda: "resumed_at" in (bench.service._lifecycle.working or {}))
    assert bench.service._lifecycle.working["resumed_at"] == saved > 5
    bench.behave(steps=1)
    bench.tick_until(lambda: bench.store.current() == 1)


@pytest.fixture
def unjudged(bench):
    """A service whose daemon ended when the worker was done and nobody had looked at its report yet."""
    bench.drop("cups")
    bench.tick_until(lambda: bench.service._lifecycle.working)
    bench.service._lifecycle._job.worker._process.wait(timeout=30)
    bench.service.stop()
    [bench.batch_id] = bench.spool.ids("work")
    bench.staging = bench.store.versions_dir / f".staging-{bench.batch_id}"
    return bench


def test_a_daemon_that_ended_between_report_and_publishing_publishes_without_learning_again(unjudged):
    """The staged version is whole, so the next start only finishes it."""
    unjudged.new_service().start()
    unjudged.run()

    assert unjudged.store.current() == 1
    assert unjudged.events().count("adapting") == 1
    assert len(unjudged.spool.load(unjudged.batch_id).attempts) == 1


@pytest.mark.parametrize("lost", ["weights.safetensors", "classes.json"])
def test_a_staged_version_that_a_crash_left_in_part_is_made_again_and_costs_no_attempt(unjudged, lost):
    """What was written last may be gone after a power cut: found by reading everything."""
    size = (unjudged.staging / lost).stat().st_size
    os.truncate(unjudged.staging / lost, size // 2)
    os.truncate(unjudged.staging / lost, size)  # of the right size, and zeros where data was
    unjudged.new_service().start()
    assert not unjudged.staging.exists()
    unjudged.run()

    outcomes = [attempt.outcome for attempt in unjudged.spool.load(unjudged.batch_id).attempts]
    assert outcomes == ["interrupted", "published as version 1"]
    assert unjudged.store.current() == 1


def test_a_worker_that_ignores_sigterm_is_made_to_stop_when_its_time_is_up_or_force_is_used(bench):
    """The second Ctrl-C does not wait."""
    bench.behave(steps=2, step_seconds=30)
    bench.drop("cups")
    bench.tick_until(lambda: (bench.service._lifecycle.working or {}).get("phase") == "train")

    started = time.monotonic()
    bench.service.stop(lambda: True)
    assert time.monotonic() - started < 5


def test_an_event_lost_in_a_crash_is_told_at_the_next_start(bench):
    """events.jsonl is a retelling; what is missing is taken from the manifests and batch records."""
    bench.drop("cups")
    bench.run()
    (bench.home / "events.jsonl").unlink()

    bench.new_service().start()

    entries = bench.service._events.read()
    assert [(e["event"], e["version"], e.get("late")) for e in entries[:2]] == [
        ("initialised", 0, True),
        ("published", 1, True),
    ]


def test_an_event_is_told_once_however_often_the_daemon_starts(bench):
    """Starting again adds nothing but the start."""
    bench.drop("cups")
    bench.run()
    before = bench.events()
    bench.new_service().start()

    assert bench.events() == [*before, "started"]


def test_the_status_file_follows_the_work(bench):
    """Watchers see batch, phase, step and steps while a worker runs, and an idle state afterwards."""
    bench.behave(steps=50, step_seconds=0.02)
    bench.drop("cups")
    seen = []

    def look():
        if (bench.home / "status.json").exists():
            seen.append(json.loads((bench.home / "status.json").read_text()))
        return bench.store.current() == 1

    bench.tick_until(look)
    bench.run()
    working = [status["working"] for status in seen if status["working"]]

    assert {"batch", "phase"} <= set(working[0])
    assert any(w.get("steps") == 50 and 0 < w["step"] <= 50 for w in working)
    assert json.loads((bench.home / "status.json").read_text())["state"] == "idle"
    assert (bench.home / "status.json").stat().st_size < 10_000
