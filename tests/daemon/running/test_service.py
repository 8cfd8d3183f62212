"""The service, iteration by iteration, with real files, a real store and a stand-in worker process."""

import json
import shutil
import signal
import time

import pytest

from daemon import requests, service
from daemon.config import Config, RetentionConfig
from daemon.exams import load_exams
from daemon.requests import Request
from deploy.errors import StoreError


def test_a_dropped_class_folder_becomes_a_live_version(bench):
    """From the inbox to `current`, with the exam kept and the work space cleaned up."""
    bench.drop("cups")
    bench.run()

    [batch_id] = bench.spool.ids("done")
    manifest = bench.store.live_manifest()
    directory = bench.spool.path(batch_id)
    [(exam_dir, exam)] = load_exams(bench.home)

    assert bench.state() == {"done": [batch_id]}
    assert (manifest.version, manifest.parent, manifest.batch.id) == (1, 0, batch_id)
    assert manifest.decision.outcome == "publish"
    assert bench.events() == ["initialised", "started", "queued", "adapting", "published"]
    assert exam.batch == batch_id
    assert {i.sha256 for i in exam.images} == {i.sha256 for i in bench.spool.load(batch_id).split("exam")}
    assert all((exam_dir / image.file).is_file() for image in exam.images)
    assert (directory / "result" / "report.json").is_file()
    assert not (directory / "checkpoint").exists()
    assert not (directory / "result" / "delta.safetensors").exists()
    assert not list(bench.store.versions_dir.glob(".*"))


def test_batches_are_learnt_in_the_order_they_came_each_on_top_of_the_other(bench):
    """Two drops make two versions, and the second one's lineage holds both."""
    bench.drop("cups")
    bench.tick_until(lambda: bench.spool.ids("queued") or bench.spool.ids("work"))
    bench.drop("plates")
    bench.run()

    lineage = [entry.batch for entry in bench.store.live_manifest().lineage]
    assert lineage == bench.spool.ids("done")
    assert bench.store.live_manifest().parent == 1


def test_a_batch_without_gain_is_held_and_the_next_one_goes_on(bench):
    """Held: no version number, delta and report and decision kept, the live version as it was."""
    bench.behave(exams=[[40, 10, 0, 0]])
    bench.drop("cups")
    bench.run()
    [held] = bench.spool.ids("held")
    result = bench.spool.path(held) / "result"

    assert bench.store.current() == 0
    assert sorted(path.name for path in result.iterdir()) == [
        "decision.json",
        "delta.safetensors",
        "report.json",
    ]
    assert json.loads((result / "decision.json").read_text())["outcome"] == "hold"
    assert not list(bench.store.versions_dir.glob(".*"))
    assert [o["event"] for o in bench.service.outcomes] == ["held"]
    assert "expected at least +1.0%, found +0.0%" in bench.service.outcomes[0]["why"]

    bench.behave()
    bench.drop("plates")
    bench.run()
    assert bench.store.current() == 1


def test_a_batch_that_harms_older_ones_is_held(bench):
    """The pooled older exams lost thirty images: evidence, whatever the batch gained itself."""
    bench.behave(exams=[[40, 10, 25, 0], [100, 80, 0, 30]])
    bench.drop("cups")
    bench.run()

    assert list(bench.state()) == ["held"]
    assert "evidence of loss: 0 images gained, 30 lost of 100" in bench.service.outcomes[0]["why"]


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


def test_the_same_batch_again_is_not_learnt_twice(bench):
    """Same images, same class: acknowledged in done/ as a duplicate of the first."""
    bench.drop("cups")
    bench.run()
    bench.drop("cups")
    bench.run()

    first, second = bench.spool.ids("done")
    assert bench.spool.load(second).duplicate_of == first
    assert bench.store.versions() == [0, 1]
    assert bench.service.outcomes[-1]["event"] == "duplicate"


def test_a_twin_published_while_its_copy_waited_in_the_queue_is_not_learnt_twice(bench):
    """Recognition happens again when a batch is taken up, not only when it arrives."""
    bench.drop("cups")
    bench.run()
    [first] = bench.spool.ids("done")
    record = bench.spool.load(first)
    twin = record.model_copy(update={"id": "000099-twin", "seq": 99, "attempts": []})
    directory = bench.spool.state_dir("queued") / twin.id
    shutil.copytree(bench.spool.path(first) / "images", directory / "images")
    bench.spool.save(twin)

    bench.run()

    assert bench.spool.load("000099-twin").duplicate_of == first
    assert bench.store.versions() == [0, 1]


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
    bench.tick_until(lambda: "resumed_at" in (bench.service._lifecycle.working or {}))
    assert bench.service._lifecycle.working["resumed_at"] == 0
    bench.run()
    manifest = bench.store.live_manifest()
    assert (manifest.version, manifest.parent, manifest.batch.id) == (2, 0, batch_id)
    assert [entry.batch for entry in manifest.lineage] == [batch_id]


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


def test_a_current_that_points_nowhere_stops_the_start_with_what_to_do(bench):
    """No daemon works on a store whose live version is gone."""
    current = bench.home / "serving" / "current"
    current.unlink()
    current.symlink_to("versions/7")

    with pytest.raises(StoreError, match=r"versions/7.*dynlora rollback --to 0"):
        bench.new_service().start()


def test_too_little_disk_space_keeps_the_batch_waiting_and_says_so(bench, monkeypatch):
    """Nothing is started that cannot be finished; the batch goes on once there is space."""
    monkeypatch.setattr("daemon.lifecycle.free_bytes", lambda path: 1000)
    bench.drop("cups")
    bench.tick_until(lambda: bench.service.trouble)
    [batch_id] = bench.spool.ids("work")
    status = json.loads((bench.home / "status.json").read_text())

    assert "too full to learn" in status["trouble"]
    assert "1,000 are free" in status["trouble"]
    assert bench.spool.load(batch_id).attempts == []

    monkeypatch.undo()
    bench.now += service.TROUBLE_SECONDS
    bench.tick_until(lambda: bench.store.current() == 1)


def test_images_of_done_batches_are_deleted_by_the_retention_policy_and_the_records_stay(bench):
    """A week later the images are gone, and their hashes still keep them out of any exam or training."""
    bench.drop("cups")
    bench.run()
    [batch_id] = bench.spool.ids("done")
    directory = bench.spool.path(batch_id)
    before = bench.spool.load(batch_id)

    bench.now += 6 * 86_400
    bench.tick()
    assert (directory / "images").is_dir()
    bench.now += 2 * 86_400
    bench.tick()

    assert not (directory / "images").exists()
    assert bench.spool.load(batch_id) == before
    assert (directory / "result" / "report.json").is_file()
    assert len(list(load_exams(bench.home))) == 1


def test_old_versions_are_pruned_only_after_the_new_one_is_live(bench):
    """keep_full versions stay whole, and version 0 for ever."""
    for name in ("a", "b", "c", "d", "e"):
        bench.drop(f"class {name}")
        bench.run()

    assert bench.store.versions() == [0, 1, 2, 3, 4, 5]
    assert bench.store.full_versions() == [0, 3, 4, 5]
    assert bench.events().count("pruned") == 2


def test_exams_can_be_switched_off(home, bench):
    """exam.keep = false publishes without keeping any image for later."""
    bench.config = Config(
        inbox=bench.config.inbox, exam=bench.config.exam.model_copy(update={"keep": False}),
        retention=RetentionConfig(done_days=0),
    )  # fmt: skip
    bench.new_service().start()
    bench.drop("cups")
    bench.run()

    assert bench.store.current() == 1
    assert list(load_exams(home)) == []


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
