"""The spool: one rename per change of state, and a plan for whatever a crash left."""

from pathlib import Path

import pytest

from daemon.batch import Batch, BatchImage
from daemon.errors import BatchError, DaemonError
from daemon.ledger import Ledger
from daemon.spool import STATES, Reason, Spool, plan_recovery


def batch(seq: int, *, exam: str = "", trained: str = "") -> Batch:
    """A record whose images have one-letter hashes."""
    images = [
        BatchImage.model_validate(
            {"file": h, "origin": h, "class_key": "cat", "sha256": h, "width": 2, "height": 2, "split": split}
        )
        for split, hashes in (("exam", exam), ("train", trained[:1]), ("tune", trained[1:]))
        for h in hashes
    ]
    return Batch(
        id=f"{seq:06d}-cat",
        seq=seq,
        slug="cat",
        kind="folders",
        received_at="2026-01-01T00:00:00+00:00",
        content_sha256="",
        classes=[],
        images=images,
    )


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """An empty spool."""
    spool = Spool(tmp_path)
    spool.create()
    return spool


def put(spool: Spool, record: Batch, state: str) -> None:
    """Put a record into a state."""
    (spool.root / state / record.id).mkdir()
    spool.save(record)


def test_a_batch_is_in_the_state_whose_directory_it_is_in(spool: Spool) -> None:
    """Moving it is the whole change of state, and moving it again is harmless."""
    put(spool, batch(1), "queued")

    assert spool.find("000001-cat") == "queued"
    assert spool.move("000001-cat", "work") == spool.root / "work" / "000001-cat"
    assert spool.move("000001-cat", "work") == spool.path("000001-cat")
    assert (spool.ids("queued"), spool.ids("work")) == ([], ["000001-cat"])
    assert spool.load("000001-cat") == batch(1)


def test_an_unknown_batch_is_answered_with_where_to_look(spool: Spool) -> None:
    """Also when its name would lead elsewhere."""
    for name in ("000009-dog", "../../etc", ""):
        with pytest.raises(BatchError, match=r"there is no batch .* `dynlora status` lists them"):
            spool.path(name)


def test_batches_are_listed_in_working_order(spool: Spool) -> None:
    """By number, whatever the padding."""
    for seq in (1_000_000, 2, 999_999):
        put(spool, batch(seq), "queued")
    (spool.root / "queued" / ".tmp-1-x").mkdir()

    assert [record.seq for record in spool.batches("queued")] == [2, 999_999, 1_000_000]


def test_a_number_is_never_used_twice(spool: Spool) -> None:
    """Neither one in any state of the spool nor one that only a manifest remembers."""
    ledger = Ledger(spool)
    assert ledger.next_seq() == 1
    for seq, state in enumerate(STATES, 1):
        put(spool, batch(seq), state)
        ledger.look()
        assert ledger.next_seq() == seq + 1
    assert ledger.next_seq(41) == 42


def test_a_failed_batch_says_why(spool: Spool) -> None:
    """reason.json lies with the data."""
    put(spool, batch(1), "work")
    reason = Reason(batch="000001-cat", reason="r", what_to_do="w", failed_at="2026-01-01T00:00:00+00:00")

    assert spool.fail(reason) == spool.root / "failed" / "000001-cat"
    assert spool.reason("000001-cat") == reason
    assert spool.load("000001-cat") == batch(1)


def test_a_missing_reason_is_an_error(spool: Spool) -> None:
    """Not an empty answer."""
    put(spool, batch(1), "failed")

    with pytest.raises(BatchError, match=r"reason\.json cannot be read"):
        spool.reason("000001-cat")


def test_history_is_told_by_all_other_batches(spool: Spool) -> None:
    """Exam images and images learnt from, tuning included; a batch is not its own past."""
    put(spool, batch(1, exam="ab", trained="cd"), "done")
    put(spool, batch(2, exam="e", trained="f"), "held")
    put(spool, batch(3, exam="g"), "incoming")

    ledger = Ledger(spool)
    ledger.look()
    history = ledger.history(without="000003-cat")

    assert history.exam == {"a", "b", "e"}
    assert history.trained == {"c", "d", "f"}


def test_recovery_is_a_function_of_the_listing() -> None:
    """What is claimed is resumed; what a crash cut short before that is removed; the rest is left."""
    plan = plan_recovery(
        {
            "incoming": {
                "000002-b": ["claim.json", "source"],
                "000001-a": ["claim.json"],
                "000003-c": [".tmp-claim.json"],
                ".tmp-x": [],
            },
            "queued": {"000004-d": ["batch.json"], ".tmp-left.json-1-2": []},
            "work": {"000005-e": ["batch.json", ".tmp-batch.json-1-2"]},
        }
    )

    assert plan.resume == ["000001-a", "000002-b"]
    assert plan.interrupted == ["000005-e"]
    assert {str(path) for path in plan.remove} == {
        "incoming/.tmp-x",
        "incoming/000003-c",
        "incoming/000003-c/.tmp-claim.json",
        "queued/.tmp-left.json-1-2",
        "work/000005-e/.tmp-batch.json-1-2",
    }


def test_recovering_twice_is_recovering_once(spool: Spool) -> None:
    """A crash during recovery is met by recovery."""
    (spool.root / "incoming" / "000001-a").mkdir()
    put(spool, batch(2), "work")

    first, second = spool.recover(), spool.recover()

    assert (len(first.remove), len(second.remove)) == (1, 0)
    assert first.interrupted == second.interrupted == ["000002-cat"]
    assert spool.ids("incoming") == []


def test_what_had_to_be_left_in_the_inbox_is_remembered(tmp_path: Path, spool: Spool) -> None:
    """Also by the next process."""
    assert spool.left_behind() == {}
    with spool.changing_left_behind() as left:
        left["cat"] = "fingerprint"

    assert Spool(tmp_path).left_behind() == {"cat": "fingerprint"}


@pytest.mark.parametrize("content", [b'{"cat": ', b'["cat"]', b'{"cat": 1}', b"\xff"])
def test_a_damaged_list_of_what_was_left_says_what_to_do(spool: Spool, content: bytes) -> None:
    """Nothing is guessed: forgetting the list would learn those drops twice."""
    (spool.root / "left.json").write_bytes(content)

    with pytest.raises(DaemonError, match=r"left\.json is damaged.*then delete this file"):
        spool.left_behind()
