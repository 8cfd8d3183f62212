"""Runs in MLflow: the real client, a real store; a server that is gone or hangs stops nobody."""

import contextlib
import json
import os
import socket
import sqlite3
import sys
import threading
import time
from contextlib import closing

import pytest

from daemon.config import MlflowConfig
from daemon.config_sources import read_config
from daemon.errors import ConfigError
from daemon.run_notes import Note, noted, write_note
from daemon.run_record import gather_run
from daemon.spool import Spool
from daemon.tracking import Tracking
from tests.daemon.running.conftest import QUICK, Bench
from tests.daemon.runs import runs_of


@pytest.fixture
def hanging():
    """The address of a server that takes connections and never answers."""
    taken, listener = [], socket.create_server(("127.0.0.1", 0))

    def take():
        while True:
            try:
                taken.append(listener.accept()[0])
            except OSError:
                return

    thread = threading.Thread(target=take)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()
    for connection in taken:
        connection.close()


@pytest.fixture
def make(tmp_path):
    """Make a tracking with some settings, in an empty home."""
    made = []

    def tracking(**settings):
        told = []
        found = Tracking(
            tmp_path, MlflowConfig(**settings), lambda event, *_, **fields: told.append((event, fields))
        )
        found.events = told
        made.append(found)
        return found

    yield tracking
    for found in made:
        found.stop()


def tick_until(tracking, is_true, now=0.0):
    """Go round until a condition holds."""
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline, tracking.trouble
        tracking.tick(now)
        time.sleep(0.02)


def test_every_decided_batch_becomes_a_run(home, tmp_path):
    """One published, one held, one failed, while no server was there: all are logged once there is one."""
    path = tmp_path / "runs.db"
    settings = {"mlflow": MlflowConfig(tracking_uri="http://127.0.0.1:9")}
    bench = Bench(home, QUICK.model_copy(update=settings))
    bench.service.start()
    drops = (
        ("red cups", {"exams": [[40, 10, 20, 0], [20, 15, 0, 1]]}),
        ("plates", {"exams": [[40, 10, 0, 0]]}),
        ("forks", {"fail": "it cannot be learnt", "retry": False}),
    )
    for name, behaviour in drops:
        bench.behave(**behaviour)
        bench.drop(name)
        bench.run()
    assert runs_of(path) == []
    there = MlflowConfig(tracking_uri=f"sqlite:///{path}", experiment="cups")
    assert bench.service._observers.runs_waiting == 3
    bench.service.reconfigure(bench.config.model_copy(update={"mlflow": there}))
    bench.tick_until(lambda: noted(home) == [])
    assert bench.service._observers.runs_waiting == 0, "each is counted until its run is whole, and no longer"
    bench.service.stop()

    published, held, failed = runs_of(path)
    assert (published.name, published.status, published.experiment) == (
        "000001-red-cups",
        "FINISHED",
        "cups",
    )
    assert (
        published.params
        | {
            "batch": "000001-red-cups",
            "version": "1",
            "parent": "0",
            "classes": "1",
            "class_names": "red cups",
            "images.train": "8",
            "preset": "default",
            "seed": "1",
        }
        == published.params
    )
    assert published.metrics["exam.new.accuracy_before"] == [(0, 0.25)]
    assert published.metrics["exam.new.accuracy_after"] == [(0, 0.75)]
    assert published.metrics["exam.old.accuracy_after"] == [(0, 0.7)]
    assert published.metrics["seconds.drop_to_live"][0][1] > 0
    manifest = json.loads((home / "serving" / "versions" / "1" / "manifest.json").read_text())
    tags = published.tags
    assert tags["dynlora.decision"] == "published"
    assert tags["dynlora.weights.sha256"] == manifest["files"]["weights.safetensors"]["sha256"]
    assert tags["dynlora.vision_model.sha256"] == manifest["files"]["vision_model.onnx"]["sha256"]
    assert manifest["decision"]["rules"][0]["detail"] in tags["dynlora.reason"]
    assert (held.name, held.tags["dynlora.decision"]) == ("000002-plates", "held")
    assert "version" not in held.params
    assert "gain" in held.tags["dynlora.reason"]
    assert (failed.name, failed.status) == ("000003-forks", "FAILED")
    assert failed.tags["dynlora.reason"] == "it cannot be learnt"
    assert noted(home) == []
    events = bench.service._events.read()
    assert [e["batch"] for e in events if e["event"] == "mlflow_logged"] == [r.name for r in runs_of(path)]
    text = path.read_bytes()
    assert b".png" not in text, "names of files are nobody's business"


def test_a_batch_is_logged_once_however_often_it_is_tried(home, tmp_path, make):
    """Killed before its note was removed, killed in the middle of a run, promoted later: it is one run."""
    bench = Bench(home, QUICK)
    bench.service.start()
    bench.behave(exams=[[40, 10, 0, 0]])
    bench.drop("cups")
    bench.run()
    bench.service.stop()
    assert bench.state() == {"held": ["000001-cups"]}
    path = tmp_path / "runs.db"
    tracking = Tracking(home, MlflowConfig(tracking_uri=f"sqlite:///{path}"), lambda *_, **__: None)
    held = Note(batch="000001-cups", decision="held", at="2030-01-01T00:00:00+00:00")
    promoted = Note(batch="000001-cups", decision="promoted", at="2030-01-02T00:00:00+00:00", version=1)
    for note in (held, promoted):
        write_note(home, note)
        tracking._waiting = None
        tick_until(tracking, lambda: noted(home) == [])
        tick_until(tracking, tracking.is_idle)

    [run] = runs_of(path)
    assert run.tags["dynlora.decision"] == "promoted"
    assert run.params["version"] == "1"
    assert len(run.metrics["exam.new.accuracy_after"]) == 2, "graded again, at another time"
    [*_, first] = _ids(path)
    with closing(sqlite3.connect(path)) as database:
        database.execute("delete from tags where key = 'dynlora.is_whole'")
        database.commit()
    write_note(
        home, Note(batch="000001-cups", decision="promoted", at="2030-01-01T00:00:00+00:00", version=1)
    )
    tracking._waiting = None
    tick_until(tracking, lambda: noted(home) == [])
    [again] = runs_of(path)
    assert again.params == run.params
    assert len(again.metrics["exam.new.accuracy_after"]) == 1
    assert first not in _ids(path)


def _ids(path):
    with closing(sqlite3.connect(path)) as database:
        return [
            row[0] for row in database.execute("select run_uuid from runs where lifecycle_stage = 'active'")
        ]


@pytest.mark.parametrize(
    ("logged", "now", "is_it"),
    [
        (("held", 1), ("held", 1), True),
        (("held", 1), ("promoted", 2), True),
        (("failed", 1), ("published", 2), False),
        (("held", 1), ("held", 2), False),
    ],
)
def test_a_retry_is_told_anew_and_a_promotion_added(tmp_path, logged, now, is_it):
    """What was learnt after a retry has other figures; what was promoted has those of when it was held."""
    records = []
    Spool(tmp_path).create()
    (tmp_path / "spool" / "held" / "000001-cups").mkdir()
    for decision, minute in (logged, now):
        note = Note(batch="000001-cups", decision=decision, at=f"2026-11-25T12:0{minute}:00+00:00")
        records.append(gather_run(tmp_path, note))
    first, second = records

    assert second.goes_on_from(first.tags) is is_it


def test_a_server_that_hangs_delays_no_batch_and_is_told_once(home, hanging):
    """Two batches go live while the first run waits for an answer; then the status says why."""
    settings = {"mlflow": MlflowConfig(tracking_uri=hanging, timeout_seconds=3600)}
    bench = Bench(home, QUICK.model_copy(update=settings))
    bench.service.start()
    for version, name in ((1, "cups"), (2, "plates")):
        bench.drop(name)
        bench.tick_until(lambda version=version: bench.store.current() == version)
    assert bench.service._observers._tracking._worker is not None
    assert noted(home) == ["000001-cups", "000002-plates"]
    reloaded = MlflowConfig(tracking_uri=hanging, timeout_seconds=0.1)
    bench.service.reconfigure(bench.config.model_copy(update={"mlflow": reloaded}))
    bench.tick_until(lambda: bench.service._observers.tracking_trouble is not None)
    bench.tick_until(bench.service.is_idle)
    bench.tick()
    status = json.loads((home / "status.json").read_text())
    started = time.monotonic()
    bench.service.stop()

    why = f"{hanging} gave no answer within 0.1 s (mlflow.timeout_seconds); 2 batches wait to be logged"
    assert status["mlflow"] == why
    assert (status["state"], status["trouble"]) == ("idle", None)
    assert time.monotonic() - started < 10
    assert noted(home) == ["000001-cups", "000002-plates"]


def test_a_server_that_is_not_there_is_named_and_tried_again(make):
    """With the system's own word; the note stays."""
    tracking = make(tracking_uri="http://127.0.0.1:9")
    tracking.told("published", {"batch": "000001-cups", "version": 1})
    tick_until(tracking, lambda: tracking.trouble is not None)

    assert tracking.trouble == (
        "http://127.0.0.1:9 cannot be used: Connection refused; 1 batch waits to be logged"
    )
    assert tracking.is_idle(), "`run --once` does not wait for it"
    tracking.tick(5.0)
    assert tracking._worker is None, "it rests"
    tracking.tick(15.0)
    assert tracking._worker is not None
    assert tracking.events == []


def test_a_client_that_is_not_installed_is_told_at_once(make, monkeypatch, tmp_path):
    """Before the first batch; by check-config too. Notes wait for the package."""
    monkeypatch.setitem(sys.modules, "mlflow", None)
    tracking = make(tracking_uri="http://127.0.0.1:9")
    tracking.tick(0.0)
    tracking.told("published", {"batch": "000001-cups", "version": 1})

    assert tracking.trouble == (
        "mlflow.tracking_uri is set, but the Python package mlflow is not installed; "
        "pip install 'dynlora[mlflow]'; 1 batch waits to be logged"
    )
    monkeypatch.undo()
    tracking.tick(20.0)
    assert tracking._worker is not None


def test_check_config_names_the_missing_package(dynlora, quick_home, monkeypatch):
    """Exit code 2: what was asked for will not be done."""
    with (quick_home / "config.toml").open("a") as file:
        file.write('[mlflow]\ntracking_uri = "http://127.0.0.1:5000"\n')
    assert dynlora("check-config", "--home", quick_home)[0] == 0
    monkeypatch.setitem(sys.modules, "mlflow", None)
    code, _, err = dynlora("check-config", "--home", quick_home)

    assert code == 2
    assert "config.toml: mlflow.tracking_uri is set, but the Python package mlflow is not installed" in err
    assert "pip install 'dynlora[mlflow]'" in err


def test_off_by_default_nothing_is_noted(bench):
    """No file, no process, no sentence."""
    bench.drop("cups")
    bench.run()

    assert bench.store.current() == 1
    assert not (bench.home / "to_mlflow").exists()
    assert bench.service._observers.tracking_trouble is None


def test_a_decision_that_a_crash_kept_from_being_told_is_logged_after_the_restart(home):
    """The batch is live, and neither event nor note was written: both are made up for."""
    bench = Bench(home, QUICK)
    bench.service.start()
    bench.drop("cups")
    bench.run()
    bench.service.stop()
    log = home / "events.jsonl"
    lines = [line for line in log.read_text().splitlines() if json.loads(line)["event"] != "published"]
    log.write_text("".join(f"{line}\n" for line in lines))
    bench.config = QUICK.model_copy(update={"mlflow": MlflowConfig(tracking_uri="http://127.0.0.1:9")})
    bench.new_service().start()
    bench.service.stop()

    assert noted(home) == ["000001-cups"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount the small disk")
def test_a_note_that_a_full_disk_refuses_is_written_later(tmp_path, mount_tmpfs):
    """Kept in memory meanwhile."""
    home = mount_tmpfs("small", 100_000)
    tracking = Tracking(home, MlflowConfig(tracking_uri="http://127.0.0.1:9"), lambda *_, **__: None)
    with (home / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    tracking.told("published", {"batch": "000001-cups", "version": 1})
    assert noted(home) == []
    (home / "filler").unlink()
    tracking.tick(0.0)

    assert noted(home) == ["000001-cups"]
    tracking.stop()


@pytest.mark.parametrize(
    "uri",
    ["runs.db", "sqlite:///runs.db", "file:runs", "http://ann:secret@host", "postgresql://h/d", "http://"],
)
def test_a_store_that_cannot_be_is_refused(tmp_path, uri):
    """With the key, the value and what was expected; no password gets into logs."""
    path = tmp_path / "config.toml"
    path.write_text(f'[mlflow]\ntracking_uri = "{uri}"\n')

    with pytest.raises(ConfigError, match=r"mlflow\.tracking_uri is .*expected http"):
        read_config(path)
