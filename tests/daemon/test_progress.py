"""What people see: a bar on a terminal, key=value lines elsewhere, nothing on stdout."""

import io
import logging
import re

import pytest
from rich.console import Console

from daemon import logs
from daemon.progress import BarView, LineView, showing


@pytest.fixture
def lines():
    """What is logged."""
    stream = io.StringIO()
    undo = logs.configure(logging.StreamHandler(stream))
    yield lambda: stream.getvalue().splitlines()
    undo()


def test_a_log_line_is_time_level_event_and_fields(lines):
    """Values with spaces are quoted, floats short, fields that are None left out."""
    logs.log("published", batch="000001-cups", version=3, why='a "b"', gain=0.123456, nothing=None)

    [line] = lines()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO published batch=000001-cups version=3 "
        r'why="a \\"b\\"" gain=0\.1235',
        line,
    )


def test_a_value_cannot_break_out_of_its_line(lines):
    """A class name with a line break is one line all the same."""
    logs.log("queued", name="one\ntwo=3")

    assert len(lines()) == 1
    assert lines()[0].endswith(r'name="one\ntwo=3"')


def test_lines_are_written_for_every_phase_but_not_for_every_step(lines):
    """A log file of a long training stays readable."""
    view = LineView()
    for step in range(500):
        view.update("train", batch="b", step=step, steps=500)
    view.update("fold", batch="b")

    assert [line.split()[2] for line in lines()] == ["train", "fold"]


def test_the_bar_shows_batch_phase_steps_and_time_left():
    """On a terminal; it leaves nothing behind when the work is done."""
    stream = io.StringIO()
    view = BarView(Console(file=stream, force_terminal=True, width=150))
    view.update("train", batch="000001-cups", step=20, steps=100, loss=1.5, kept_rank=8.0, eta_seconds=12.3)
    view._progress.refresh()
    view.clear()
    view.clear()

    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "000001-cups learning" in shown
    assert "20/100  loss 1.500  rank 8  12 s left" in shown


def test_showing_writes_to_stderr_and_puts_logging_back(capsys):
    """Stdout belongs to results."""
    handlers = list(logging.getLogger("dynlora").handlers)
    with showing() as view:
        view.update("load")
        logs.log("ready")
    out, err = capsys.readouterr()

    assert out == ""
    assert [line.split()[2] for line in err.splitlines()] == ["load", "ready"]
    assert logging.getLogger("dynlora").handlers == handlers
