"""Log lines in the form that whoever reads them expects: people, systemd's journal, programs."""

import io
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from daemon import logs


@pytest.fixture
def written():
    """Log in one form; what came out."""
    undone = []

    def start(form):
        stream = io.StringIO()
        undone.append(logs.configure(logging.StreamHandler(stream), "debug", form))
        return stream.getvalue

    yield start
    for undo in undone:
        undo()


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.DEBUG, 7), (logging.INFO, 6), (logging.WARNING, 4), (logging.ERROR, 3)],
)
def test_the_journal_is_told_the_priority_and_keeps_the_time_itself(written, level, priority):
    """`journalctl -p warning` finds what is at least a warning."""
    text = written("journal")
    logs.log("failed", level=level, batch="000001-cups", why="no images")

    assert text() == f'<{priority}>failed batch=000001-cups why="no images"\n'


def test_every_line_of_a_traceback_has_its_priority(written):
    """A line without one would be another entry of the journal, at another level."""
    text = written("journal")
    try:
        raise ValueError("of two\nlines")
    except ValueError:
        logs.log("oops", level=logging.ERROR, exc_info=True)

    lines = text().splitlines()
    assert len(lines) > 3
    assert all(line.startswith("<3>") for line in lines)


def test_json_lines_hold_the_fields_as_they_are(written):
    """Numbers stay numbers, and what is not there is left out."""
    text = written("json")
    logs.log("published", batch="000001-cups", version=3, exam_after=0.5, why=None, changed=["a b"])

    entry = json.loads(text())
    assert entry.pop("at").endswith("Z")
    assert entry == {
        "level": "info",
        "event": "published",
        "batch": "000001-cups",
        "version": 3,
        "exam_after": 0.5,
        "changed": ["a b"],
    }


def test_a_field_cannot_pass_for_the_head_of_a_json_line(written):
    """An event about another event keeps its own name."""
    text = written("json")
    logs.log("note", at="yesterday", batch="b")

    assert json.loads(text())["event"] == "note"
    assert json.loads(text())["at"] != "yesterday"


def test_standing_fields_are_in_every_line_until_taken_away(written):
    """The live version, in lines that say nothing of it themselves."""
    text = written("plain")
    logs.stand(live=4)
    logs.log("queued", batch="b")
    logs.log("rolled_back", live=2)
    logs.stand(live=None)
    logs.log("queued", batch="c")

    assert [line.split(maxsplit=2)[2] for line in text().splitlines()] == [
        "queued batch=b live=4",
        "rolled_back live=2",
        "queued batch=c",
    ]


def test_the_journal_is_recognised_by_the_stream_that_systemd_connected():
    """JOURNAL_STREAM names device and inode; a stderr that was redirected since is no journal."""
    script = (
        "import os, sys; from daemon import logs; found = os.fstat(int(sys.argv[1]));"
        "environ = {'JOURNAL_STREAM': f'{found.st_dev}:{found.st_ino}'};"
        "print(logs.form_for(sys.stderr, environ), logs.form_for(sys.stderr, {}))"
    )
    root = Path(__file__).resolve().parents[2]
    said = []
    with tempfile.TemporaryFile() as file:
        for descriptor in (2, file.fileno()):
            command = [sys.executable, "-c", script, str(descriptor)]
            done = subprocess.run(
                command,
                cwd=root,
                env=os.environ | {"PYTHONPATH": str(root)},
                pass_fds=[file.fileno()],
                capture_output=True,
                text=True,
                check=True,
            )
            said.append(done.stdout.split())

    assert said == [["journal", "plain"], ["plain", "plain"]]
