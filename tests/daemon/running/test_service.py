"""The service, iteration by iteration, with real files, a real store and a stand-in worker process."""

import json
import shutil

from daemon.config import Config, RetentionConfig
from daemon.exams import load_exams


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
