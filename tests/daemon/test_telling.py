"""What became of a drop is told where its sender looks: the log, events.jsonl, `submit --wait`."""

import os
import subprocess
import sys

import pytest

from daemon.batch import MOST_TOLD
from daemon.events import EventLog
from daemon.home import create_home
from daemon.lock import HomeLock
from daemon.reception import Reception


def spoil(folder, count: int) -> None:
    """Put files into a class folder that are no images."""
    for number in range(count):
        (folder / f"text-{number:02}.jpg").write_text("not an image")


def test_every_sentence_is_an_event_up_to_a_number_that_can_be_read(bench) -> None:
    """The rest is counted, with where to read it."""
    spoil(bench.class_folder("dress"), MOST_TOLD + 5)

    bench.step()
    queued, *events = bench.step(60)

    record = bench.spool.root / "*" / "000001-dress" / "batch.json"
    assert queued.message.endswith(f"; {MOST_TOLD + 5} set aside, named in {record}")
    assert {(event.event, event.batch) for event in events} == {("batch_set_aside", "000001-dress")}
    sentences = [item.sentence for item in bench.only("queued").set_aside]
    assert [event.message for event in events] == [
        *sentences[:MOST_TOLD],
        f"5 more sentences like these are in {record}",
    ]
    assert [path.is_file() for path in bench.spool.root.glob("*/000001-dress/batch.json")] == [True]


def test_a_batch_of_which_nothing_is_usable_names_every_reason(bench) -> None:
    """One sentence for the whole is not enough to mend it."""
    for name in ("dress", "hat"):
        bench.class_folder(name, 1)

    message, *rest = bench.settle()

    assert "no class in it has enough usable images. It is kept in" in message
    assert [sentence.partition(";")[0] for sentence in rest] == [
        f"{name} was set aside: it has 1 usable image" for name in ("dress", "hat")
    ]


def test_what_is_told_is_in_the_event_log(bench) -> None:
    """For whoever looks later."""
    spoil(bench.class_folder("Polar Bear"), 1)
    bench.class_folder("polar_bear")
    log = EventLog(bench.home)
    bench.config = bench.config.model_copy(
        update={"inbox": bench.config.inbox.model_copy(update={"settle_seconds": 0, "gather_seconds": 0})}
    )
    reception = Reception(
        bench.home, bench.config, tell=lambda event, level=0, /, **fields: log.append(event, **fields)
    )

    for now in (0.0, 100.0):
        reception.tick(now)

    batch = bench.only("queued")
    found = [(entry["event"], entry["what"]) for entry in log.read() if entry["batch"] == batch.id]
    assert found[1:] == [
        ("set_aside", batch.set_aside[0].sentence),
        ("note", "'polar_bear' and 'Polar Bear' are one class, shown as 'Polar Bear'"),
    ]


def test_a_name_that_steers_a_terminal_is_shown_spelled_out(bench) -> None:
    """Line breaks and escape codes from strangers reach no screen."""
    (bench.class_folder("dress") / "\x1b[2Jred\n.txt").write_text("x")

    _, sentence = bench.settle()

    assert sentence.startswith("dress/\\x1b[2Jred\\n.txt was set aside: ")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("usable", [5, 1])
def test_submit_wait_prints_what_was_set_aside_and_noticed(bench, tmp_path, usable: int) -> None:
    """Learnt or not; then what became of it."""
    create_home(bench.home)
    bench.class_folder("Dress")
    bench.settle()
    folder = bench.class_folder("dress", usable, under=tmp_path / "mine")
    spoil(folder, 2)
    command = [sys.executable, "-m", "daemon.cli", "--home", str(bench.home), "submit", str(folder), "--wait"]
    with HomeLock(bench.home):
        program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        while program.poll() is None:
            bench.step()
            if bench.spool.find("000002-dress") == "queued":
                record = bench.spool.load("000002-dress")
                bench.spool.save(record.model_copy(update={"duplicate_of": "000001-dress"}))
                bench.spool.move("000002-dress", "done")
        lines = (program.communicate()[0]).splitlines()

    assert [line.partition(" was set aside")[0] for line in lines[:2]] == [
        "dress/text-00.jpg",
        "dress/text-01.jpg",
    ]
    assert "'dress' exists already, as 'Dress'; this batch adds images to it" in lines
    end = "was not learnt again: 000001-dress brought the same" if usable == 5 else "failed: no class in it"
    assert lines[-1].startswith(f"000002-dress {end}")
