"""What is said of a batch: names and numbers within the limits of old servers, whatever is missing."""

import json

from daemon.batch import BATCH_FILE
from daemon.curve import CurveWriter, Point
from daemon.report import RESULT_DIR
from daemon.run_notes import Note, noted, read_note, remove_note, write_note
from daemon.run_record import LONGEST, gather_run
from daemon.spool import Reason

AT = "2026-11-25T12:00:00+00:00"


def learnt(bench, *names):
    """A batch of these classes that was taken in."""
    for name in names:
        bench.class_folder(name)
    bench.settle()
    return bench.only("queued")


def test_names_of_classes_are_cut_where_old_servers_would_refuse_them(bench):
    """As many as fit, and how many more there are."""
    batch = learnt(bench, *(f"class number {number:03d} näme" for number in range(60)))
    params = gather_run(bench.home, Note(batch=batch.id, decision="published", at=AT)).params

    assert params["classes"] == "60"
    assert len(params["class_names"]) <= LONGEST
    shown, _, more = params["class_names"].partition(" and ")
    assert len(shown.split(", ")) + int(more.split()[0]) == 60
    assert all(value for value in params.values())


def test_a_drop_that_was_refused_before_it_had_a_record_is_a_run_with_its_reason(bench):
    """Nothing but the note is known of it; a batch that is gone altogether is none."""
    batch = learnt(bench, "cups")
    (bench.spool.path(batch.id) / BATCH_FILE).unlink()
    bench.spool.fail(Reason(batch=batch.id, reason="no", what_to_do="x", failed_at=AT))
    record = gather_run(bench.home, Note(batch=batch.id, decision="failed", at=AT, why="it is a bomb"))

    assert record.has_failed
    assert (record.tags["dynlora.reason"], record.params) == ("it is a bomb", {"batch": batch.id})
    assert record.started_at == record.ended_at
    assert gather_run(bench.home, Note(batch="000099-gone", decision="failed", at=AT)) is None


def test_half_a_report_and_a_version_that_is_gone_cost_their_figures_only(bench):
    """The run is logged with what can be read."""
    batch = learnt(bench, "cups")
    directory = bench.spool.path(batch.id)
    (directory / RESULT_DIR).mkdir()
    (directory / RESULT_DIR / "report.json").write_text('{"batch": ')
    (directory / "plan.json").write_text("{}")
    CurveWriter(directory, is_new=True).add(Point(1, 2.0, 3.0, 4.0))
    record = gather_run(bench.home, Note(batch=batch.id, decision="published", at=AT, version=7))

    assert record.curve == [Point(1, 2.0, 3.0, 4.0)]
    assert record.params["version"] == "7"
    assert not any(name.startswith("exam") for name in record.figures)


def test_the_same_batch_is_known_again_in_a_home_that_was_moved(bench, tmp_path):
    """Another machine, another path: one run; another batch of the same id is another."""
    batch = learnt(bench, "cups")
    note = Note(batch=batch.id, decision="held", at=AT)
    before = gather_run(bench.home, note).identity
    bench.home.joinpath("spool").rename(tmp_path / "moved-spool")
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "moved-spool").rename(moved / "spool")
    assert gather_run(moved, note).identity == before

    path = moved / "spool" / "queued" / batch.id / BATCH_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"received_at": "2020-01-01T00:00:00+00:00"}))
    assert gather_run(moved, note).identity != before


def test_notes_are_listed_in_working_order_and_a_damaged_one_is_nobodys(tmp_path):
    """Other files in the folder are left alone."""
    for name in ("000010-b", "000002-a"):
        write_note(tmp_path, Note(batch=name, decision="held", at=AT))
    folder = tmp_path / "to_mlflow"
    (folder / "README").touch()
    (folder / "000003-c.json").write_text("{")

    assert noted(tmp_path) == ["000002-a", "000003-c", "000010-b"]
    assert read_note(tmp_path, "000003-c") is None
    remove_note(tmp_path, "000002-a")
    remove_note(tmp_path, "000002-a")
    assert noted(tmp_path) == ["000003-c", "000010-b"]
