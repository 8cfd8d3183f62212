"""A batch's images are removed everywhere, at every stage; what was learnt and its history stay."""

import json
import time

import numpy as np
import pytest

from daemon import requests
from daemon.errors import RequestError
from daemon.exam_embeddings import EMBEDDINGS_NAME
from daemon.forget import finish_forgetting, forget
from daemon.requests import Request
from daemon.seen import SEEN_NAME, Seen
from deploy import atomic
from deploy.verify import check_files
from tests.daemon.running.tiny_home import TinyHome, batch_name


@pytest.fixture
def tiny(tmp_path):
    """A daemon on a home of versions 0 to 2."""
    tiny = TinyHome(tmp_path / "home")
    tiny.create(2)
    tiny.start()
    yield tiny
    tiny.service.stop(lambda: True)


def order_forget(tiny, batch):
    """Through the running daemon."""
    name = requests.leave(tiny.home, Request(command="forget", batch=batch, who="ann", why="asked to"))
    deadline = time.monotonic() + 30
    while (answer := requests.take_answer(tiny.home, name)) is None:
        assert time.monotonic() < deadline
        tiny.tick()
    return answer


def pictures(tiny):
    """Every image file in the home, by the batch it belongs to."""
    found = [path.relative_to(tiny.home) for path in tiny.home.rglob("*.png")]
    return {str(next(p for p in path.parts if "0000" in p)).removeprefix(".tmp-") for path in found}


def test_a_done_batch_leaves_no_image_and_its_versions_stay(tiny):
    """Spool and exams; the record keeps hashes and no file's name; every version is what it was."""
    answer = order_forget(tiny, batch_name(1))

    assert answer.exit_code == 0
    assert answer.result["images"] == {"spool": 2, "exams": 2, "inbox": 0}  # an exam is an image and a record
    assert pictures(tiny) == {batch_name(2)}
    record = (tiny.spool.path(batch_name(1)) / "batch.json").read_text()
    assert "holiday" not in record
    assert json.loads(record)["forgotten"]["who"] == "ann"
    assert len(tiny.spool.load(batch_name(1)).images) == 2
    for version in tiny.store.versions():
        check_files(tiny.store.path(version), tiny.store.manifest(version).files)
    assert f"`dynlora revert {batch_name(1)}`" in answer.result["remains"][0]
    assert order_forget(tiny, batch_name(1)).result["images"] == {"spool": 0, "exams": 0, "inbox": 0}


def test_what_was_computed_of_exam_images_goes_with_them(tiny):
    """Of a kept exam and of a held batch; it is as good as the images to whoever has the model."""
    held = tiny.add("held", 3)
    for directory in (tiny.home / "exams" / batch_name(1), tiny.spool.path(held)):
        (directory / EMBEDDINGS_NAME).write_bytes(b"embeddings")
    order_forget(tiny, batch_name(1))
    order_forget(tiny, held)

    assert not list(tiny.home.rglob(EMBEDDINGS_NAME))


def test_its_part_in_the_moments_of_all_batches_is_told(tiny):
    """Only of a batch that is in them; the file stays, and one that is damaged says nothing."""
    moments, mean, covariance = tiny.home / SEEN_NAME, np.ones(4, np.float32), np.eye(4, dtype=np.float32)
    Seen(mean, covariance, 2, (batch_name(1), batch_name(7))).save(moments)
    told, not_told = (order_forget(tiny, batch_name(n)).result["remains"] for n in (1, 2))

    [sentence] = [remains for remains in told if str(moments) in remains]
    assert "its images, of 2 batches in all; no image can be made from them" in sentence
    assert not any(SEEN_NAME in remains for remains in not_told)
    assert Seen.load(moments).batches == (batch_name(1), batch_name(7))
    moments.write_bytes(b"damaged")
    assert not any(SEEN_NAME in remains for remains in order_forget(tiny, batch_name(1)).result["remains"])


def test_a_held_batch_keeps_what_was_learnt_and_can_still_be_promoted(tiny):
    """Its delta is no image."""
    batch = tiny.add("held", 3)
    assert order_forget(tiny, batch).result["state"] == "held"

    assert pictures(tiny) == {batch_name(1), batch_name(2)}
    assert (tiny.spool.path(batch) / "result" / "delta.safetensors").exists()
    name = requests.leave(tiny.home, Request(command="promote", batch=batch))
    while (answer := requests.take_answer(tiny.home, name)) is None:
        tiny.tick()
    assert (answer.exit_code, tiny.store.current()) == (0, 3)
    assert pictures(tiny) == {batch_name(1), batch_name(2)}


@pytest.mark.parametrize("stage", ["queued", "work"])
def test_a_batch_that_is_not_settled_is_taken_from_the_worker_and_never_learnt(tiny, stage):
    """It goes to failed/ and says on whose word; the other one goes on."""
    first, second = tiny.add("queued", 3), tiny.add("queued", 4)
    doomed, other = (second, first) if stage == "queued" else (first, second)
    while tiny.service._lifecycle.working is None:
        tiny.tick()

    assert order_forget(tiny, doomed).exit_code == 0

    assert tiny.spool.find(doomed) == "failed"
    assert tiny.spool.reason(doomed).reason == "its images were forgotten before it was learnt"
    assert doomed not in pictures(tiny)
    while (tiny.service._lifecycle.working or {}).get("batch") != other:
        tiny.tick()


def test_a_worker_that_may_be_reading_the_exam_is_stopped_first(tiny):
    """It goes on from its checkpoint and grades without that exam; the attempt does not count."""
    batch = tiny.add("queued", 3)
    while tiny.service._lifecycle.working is None:
        tiny.tick()

    order_forget(tiny, batch_name(1))
    tiny.tick()

    outcomes = [attempt.outcome for attempt in tiny.spool.load(batch).attempts]
    assert outcomes[0] == f"restarted: the exam of {batch_name(1)} was forgotten"


def test_a_drop_that_was_left_in_the_inbox_goes_too(tiny):
    """Where it could not be moved it was copied, and hidden under the batch's name."""
    left = tiny.home / "inbox" / f".claimed-{batch_name(2)}"
    left.mkdir()
    (left / "holiday.png").write_bytes(b"x")

    assert order_forget(tiny, batch_name(2)).result["images"]["inbox"] == 1
    assert not left.exists()


def test_a_batch_that_is_being_taken_in_is_left_alone(tiny):
    """For a moment only, and it says so."""
    tiny.add("incoming", 3)

    with pytest.raises(RequestError, match=r"is being taken in: try again in a moment"):
        forget(tiny.home, tiny.home / "inbox", batch_name(3), who="ann", why="")


def test_forgetting_cut_short_anywhere_is_ended_at_the_next_start(tiny, monkeypatch):
    """Once the record says so, nothing brings the images back."""
    real = atomic.remove_tree
    for allowed in range(4):
        batch = tiny.add("done", 5 + allowed)
        left = [allowed]

        def remove(path, left=left):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            real(path)

        with monkeypatch.context() as patch:
            patch.setattr(atomic, "remove_tree", remove)
            try:
                forget(tiny.home, tiny.home / "inbox", batch, who="ann", why="")
            except KeyboardInterrupt:
                assert batch in pictures(tiny) or allowed
        finish_forgetting(tiny.home, tiny.home / "inbox")
        assert batch not in pictures(tiny)
        assert finish_forgetting(tiny.home, tiny.home / "inbox") == []


def test_a_drop_that_only_its_owner_can_remove_is_told_and_stops_nothing(tiny, monkeypatch):
    """The rest goes, the next start works, and the sentence says whose turn it is."""
    batch = tiny.add("queued", 3)
    claimed = tiny.home / "inbox" / f".claimed-{batch}"
    claimed.mkdir(parents=True)
    remove = atomic.remove_tree

    def refuse(path):
        if path == claimed:
            raise PermissionError(13, "Permission denied", str(path))
        remove(path)

    monkeypatch.setattr(atomic, "remove_tree", refuse)
    answer = order_forget(tiny, batch)

    assert (answer.exit_code, answer.result["state"]) == (0, "failed")
    assert any(str(claimed) in sentence and "owner" in sentence for sentence in answer.result["remains"])
    assert finish_forgetting(tiny.home, tiny.home / "inbox") == []
    tiny.start()
    assert tiny.service.trouble is None


def test_what_a_batch_taught_before_its_next_attempt_is_forgotten_too(tiny):
    """Plan, delta and staged weights of an attempt that failed go with the images."""
    batch = tiny.add("queued", 3)
    result = tiny.spool.path(batch) / "result"
    result.mkdir()
    (result / "delta.safetensors").write_bytes(b"learnt")
    staging = tiny.store.versions_dir / f".staging-{batch}"
    staging.mkdir()
    (staging / "weights.safetensors").write_bytes(b"learnt")

    assert order_forget(tiny, batch).result["state"] == "failed"
    assert not staging.exists()
    assert not (tiny.spool.path(batch) / "result").exists()


def test_the_same_images_in_another_batch_are_named(tiny):
    """A second delivery is a batch of its own, and whoever wants images gone must know of it."""
    batch, twin = tiny.add("queued", 3), tiny.add("held", 4)
    record = tiny.spool.load(twin)
    tiny.spool.save(record.model_copy(update={"duplicate_of": batch}))

    remains = order_forget(tiny, batch).result["remains"]
    assert any(twin in sentence and "forget these too" in sentence for sentence in remains)
    assert not any("forget these too" in sentence for sentence in order_forget(tiny, twin).result["remains"])
