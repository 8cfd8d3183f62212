"""The event log survives what can happen to a file."""

import json
import subprocess
from datetime import UTC, datetime

import pytest

from daemon.events import EventLog


def test_events_are_read_back_in_order_without_empty_fields(tmp_path):
    """What was appended is what a reader gets; fields that are None are left out."""
    log = EventLog(tmp_path)
    log.append("claimed", batch="000001-cups", version=None)
    log.append("published", at=datetime(2026, 1, 31, tzinfo=UTC), batch="000001-cups", version=1)

    first, second = log.read()

    assert (first["event"], "version" in first) == ("claimed", False)
    assert second == {
        "at": "2026-01-31T00:00:00.000+00:00",
        "event": "published",
        "batch": "000001-cups",
        "version": 1,
    }


def test_a_torn_last_line_is_skipped_and_never_joined_to_the_next(tmp_path):
    """After a crash in the middle of a line the events before and after it are both there."""
    log = EventLog(tmp_path)
    log.append("claimed", batch="a")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"at": "2026-01-31T00:00:00.000+00:00", "event": "publi')

    log.append("published", batch="a")

    assert [entry["event"] for entry in log.read()] == ["claimed", "published"]


def test_names_in_any_script_stay_readable_and_on_one_line(tmp_path):
    """A class name with an emoji, a quote and a line break is one JSON line."""
    EventLog(tmp_path).append("queued", classes=['tasse ☕ "gross"\nklein'])

    [line] = (tmp_path / "events.jsonl").read_text().splitlines()
    assert json.loads(line)["classes"] == ['tasse ☕ "gross"\nklein']
    assert "☕" in line


def test_a_grown_log_is_rotated_and_still_read_from_its_beginning(tmp_path):
    """Rotation loses no event and keeps their order; a daemon that runs for months need not start anew."""
    log = EventLog(tmp_path, max_bytes=100)
    for number in range(9):
        log.append("queued", batch=f"{number:06}")

    assert len(list(tmp_path.glob("events-*.jsonl"))) >= 2
    assert [entry["batch"] for entry in log.read()] == [f"{number:06}" for number in range(9)]


def test_a_line_torn_by_a_full_disk_costs_no_later_event(tmp_path, mount_tmpfs):
    """The process goes on after the refusal, and so does the log."""
    disk = mount_tmpfs("disk", 8192)  # two pages
    log = EventLog(disk)
    log.append("queued", why="x" * 4000)
    with pytest.raises(OSError, match="disk is full"):
        log.append("queued", why="y" * 6000)
    before = len(log.read())
    subprocess.run(["mount", "-o", "remount,size=16384", str(disk)], check=True)
    log.append("published", batch="after")

    assert len(log.read()) == before + 1
    assert log.read()[-1]["batch"] == "after"
