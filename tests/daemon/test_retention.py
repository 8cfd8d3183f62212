"""What is deleted after its time, and what is not."""

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from daemon.config import RetentionConfig
from daemon.exams import EXAM_FILE
from daemon.ledger import Ledger
from daemon.retention import drop_old_events, drop_old_exams, is_worth_telling, sweep
from deploy import atomic

WEEK = 7 * 86_400.0


def done(bench, name: str) -> Path:
    """A batch in done/ for a long time."""
    bench.settle()
    directory = bench.spool.move(name, "done")
    os.utime(directory / "batch.json", (0, 0))
    return directory


def test_what_was_never_learnt_stays(bench) -> None:
    """The images go; the folder with what was set aside does not."""
    folder = bench.class_folder("dress")
    (folder / "notes.txt").write_text("wash cold")
    directory = done(bench, "000001-dress")

    sweep(bench.home, RetentionConfig(), 2 * WEEK)

    assert not (directory / "images").exists()
    assert bench.aside(bench.spool.load("000001-dress")).keys() == {"notes.txt"}
    assert sorted(path.name for path in directory.iterdir()) == ["batch.json", "source"]


def test_a_batch_of_which_all_was_learnt_leaves_its_record_only(bench) -> None:
    """As before."""
    bench.class_folder("dress")
    directory = done(bench, "000001-dress")

    sweep(bench.home, RetentionConfig(), 2 * WEEK)

    assert [path.name for path in directory.iterdir()] == ["batch.json"]


def test_one_batch_that_cannot_be_deleted_does_not_stop_the_sweep(
    bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither does a record that cannot be read: without it nobody knows what was set aside."""
    directories = []
    for number, name in enumerate(("dress", "hat", "shoe"), 1):
        bench.class_folder(name)
        directories.append(done(bench, f"{number:06d}-{name}"))
    first, second, third = directories
    (second / "batch.json").write_text("{")
    os.utime(second / "batch.json", (0, 0))

    def remove(path: Path) -> None:
        if path.is_relative_to(first):
            raise PermissionError(13, "Permission denied", str(path))
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    monkeypatch.setattr(atomic, "remove_tree", remove)

    sweep(bench.home, RetentionConfig(), 2 * WEEK)

    assert (first / "images").is_dir()
    assert (second / "images").is_dir()
    assert not (third / "images").exists()


def exam_of(home: Path, batch_id: str, *, age_days: float, now: float) -> Path:
    """An exam that was kept so long ago."""
    directory = home / "exams" / batch_id
    (directory / "images").mkdir(parents=True)
    (directory / "images" / "a.png").write_bytes(b"a")
    (directory / EXAM_FILE).write_text("{}")
    os.utime(directory / EXAM_FILE, (now - age_days * 86_400,) * 2)
    return directory


def test_exams_go_after_their_days_and_only_where_days_are_given(tmp_path: Path) -> None:
    """By default none; then the old ones, whole, and what is no exam is left alone."""
    now = 1_900_000_000.0
    old = exam_of(tmp_path, "000001-dress", age_days=31, now=now)
    young = exam_of(tmp_path, "000002-hat", age_days=29, now=now)
    (tmp_path / "exams" / "notes.txt").write_text("mine")

    assert list(drop_old_exams(tmp_path, RetentionConfig(), now)) == []
    assert list(drop_old_exams(tmp_path, RetentionConfig(exam_days=30), now)) == ["000001-dress"]
    assert not old.exists()
    assert (young / "images" / "a.png").exists()
    assert sorted(path.name for path in young.parent.iterdir()) == ["000002-hat", "notes.txt"]


def test_an_image_whose_exam_was_dropped_is_still_never_learnt_from(bench) -> None:
    """The record of the batch has its hash, and the split of later batches goes by records."""
    bench.class_folder("dress")
    done(bench, "000001-dress")
    ledger = Ledger(bench.spool)
    ledger.look()
    before = ledger.history()
    exam_of(bench.home, "000001-dress", age_days=400, now=WEEK)

    assert list(drop_old_exams(bench.home, RetentionConfig(exam_days=30), WEEK)) == ["000001-dress"]
    assert before.exam
    after = Ledger(bench.spool)
    after.look()
    assert after.history() == before


def test_earlier_files_of_events_go_after_their_days(tmp_path: Path) -> None:
    """By the time in their names; the one that is written to stays whatever its age."""
    now, day = 1_900_000_000.0, 86_400
    names = [f"events-{round((now - days * day) * 1e9):020d}.jsonl" for days in (31, 29)]
    for name in [*names, "events.jsonl"]:
        (tmp_path / name).write_text('{"event": "started"}\n')

    assert list(drop_old_events(tmp_path, RetentionConfig(), now)) == []
    assert list(drop_old_events(tmp_path, RetentionConfig(event_days=30), now)) == [names[0]]
    assert sorted(path.name for path in tmp_path.iterdir()) == [names[1], "events.jsonl"]


def test_what_was_deleted_is_not_told_again_as_if_it_had_been_lost() -> None:
    """At a start what is missing is derived from the files; what is too old to be kept is not missing."""
    now = 1_900_000_000.0
    old, young = (datetime.fromtimestamp(now - days * 86_400, UTC) for days in (31, 29))
    kept = RetentionConfig(event_days=30)

    assert [is_worth_telling(at, kept, now) for at in (old, young, None)] == [False, True, True]
    assert is_worth_telling(old, RetentionConfig(), now)
