"""What is remembered of batches is what their records say, whatever way they take through the spool."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon import ledger as module
from daemon.batch import Batch, BatchClass, BatchImage
from daemon.ledger import Ledger
from daemon.spool import STATES, Spool


def record(seq: int, *, key: str = "cup", name: str = "Cup", producer_id: str | None = None) -> Batch:
    """A batch of one image that grades and one that is learnt from."""
    images = [
        BatchImage(
            file=split, origin=split, class_key=key, sha256=f"{split}-{seq}", width=2, height=2, split=split
        )
        for split in ("exam", "train")
    ]
    classes = [BatchClass(name=name, key=key, template="a {}", folder=key, is_new=False)]
    return Batch(
        id=f"{seq:06d}-x", seq=seq, slug="x", kind="batch", received_at="2026-01-01T00:00:00+00:00",
        content_sha256=f"content-{seq}", classes=classes, images=images, producer_id=producer_id,
    )  # fmt: skip


def put(spool: Spool, batch: Batch, state: str) -> None:
    """A batch in a state, with its record."""
    directory = spool.root / state / batch.id
    directory.mkdir()
    (directory / "batch.json").write_text(batch.to_json())


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """An empty spool."""
    spool = Spool(tmp_path)
    spool.create()
    return spool


def test_a_record_is_read_once_on_its_whole_way(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From incoming/, where it counts already, to done/."""
    reads: list[Path] = []
    read = module.read_batch
    monkeypatch.setattr(module, "read_batch", lambda path: reads.append(path) or read(path))
    ledger = Ledger(spool)
    put(spool, record(1), "incoming")
    for state in ("queued", "work", "done"):
        assert ledger.history().exam == {"exam-1"}
        spool.move("000001-x", state)  # type: ignore[arg-type]
    assert ledger.history().trained == {"train-1"}

    assert len(reads) == 1


def test_a_record_in_incoming_is_read_again_when_it_changes(spool: Spool) -> None:
    """An image was gone when it was to be moved."""
    ledger = Ledger(spool)
    put(spool, record(1), "incoming")
    assert ledger.history().trained == {"train-1"}
    batch = record(1)
    spool.save(batch.model_copy(update={"images": batch.images[:1]}))

    assert ledger.history().trained == set()


def test_a_batch_that_leaves_incoming_while_it_is_looked_at_counts(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that takes in a large drop moves it between two looks of the daemon."""
    ledger = Ledger(spool)
    put(spool, record(1), "incoming")
    look = ledger._take_over

    def look_then_move() -> bool:
        found = look()
        if spool.find("000001-x") == "incoming":
            spool.move("000001-x", "queued")
        return found

    monkeypatch.setattr(ledger, "_take_over", look_then_move)

    assert ledger.history().exam == {"exam-1"}


def test_the_first_spelling_on_its_way_counts(spool: Spool) -> None:
    """Until that batch is through; then the next one's does."""
    ledger = Ledger(spool)
    for seq, name in ((2, "CUP"), (1, "Cup"), (3, "cup")):
        put(spool, record(seq, name=name), "queued")
    ledger.look()
    assert ledger.coming["cup"].name == "Cup"
    spool.move("000001-x", "done")
    ledger.look()
    assert (ledger.coming["cup"].name, len(ledger.coming), list(ledger.coming)) == ("CUP", 1, ["cup"])
    for seq in (2, 3):
        spool.move(f"{seq:06d}-x", "held")
    ledger.look()

    assert ledger.coming.get("cup") is None


def test_twins_are_named_by_content_and_by_producer_the_one_at_work_first(spool: Spool) -> None:
    """Not those that failed, which may be tried again, and not the batch itself."""
    ledger = Ledger(spool)
    for seq, state in ((1, "done"), (2, "work"), (3, "failed"), (4, "incoming")):
        put(spool, record(seq, producer_id="p"), state)
    ledger.history()

    assert list(ledger.twins(record(9, producer_id="p"))) == [
        ("000002-x", "work"), ("000001-x", "done"), ("000004-x", "incoming"),
    ]  # fmt: skip
    assert list(ledger.twins(record(2))) == []
    assert list(ledger.twins(record(1).model_copy(update={"id": "000009-x"}))) == [("000001-x", "done")]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([*STATES, "gone"])), max_size=12))
def test_whatever_happens_it_says_what_a_new_one_says(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[int, str]]
) -> None:
    """Batches appear, move and vanish in any order, with a look after each."""
    spool = Spool(tmp_path_factory.mktemp("spool"))
    spool.create()
    ledger = Ledger(spool)
    for seq, state in moves:
        here = spool.find(f"{seq:06d}-x")
        if state == "gone":
            if here is not None:
                (spool.path(f"{seq:06d}-x") / "batch.json").unlink()
                spool.path(f"{seq:06d}-x").rmdir()
        elif here is None:
            put(spool, record(seq), state)
        else:
            spool.move(f"{seq:06d}-x", state)  # type: ignore[arg-type]
        fresh = Ledger(spool)
        known, expected = ledger.history(), fresh.history()

        assert (known.exam, known.trained) == (expected.exam, expected.trained)
        assert dict(ledger.coming) == dict(fresh.coming)
        assert ledger.next_seq() >= fresh.next_seq()
        assert list(ledger.twins(record(1).model_copy(update={"id": "000009-x"}))) == list(
            fresh.twins(record(1).model_copy(update={"id": "000009-x"}))
        )
