"""Waiting for other processes ends, however they do."""

import sys

import pytest

from benchmarks.waiting import Companion, wait_for


@pytest.fixture
def companion(tmp_path):
    """Start a process that runs a piece of Python; ended with the test."""
    started = []

    def start(code):
        started.append(Companion("helper", [sys.executable, "-c", code], tmp_path / "helper.txt"))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()


def test_what_is_found_is_returned(companion):
    """A line that the process writes later, and only once it is complete."""
    helper = companion("import time; print('12 now', flush=True); time.sleep(60)")
    assert wait_for(lambda: helper.lines() or None, "line", (helper,), seconds=60) == ["12 now"]


def test_it_does_not_wait_for_a_process_that_ended(companion):
    """The message says how it ended and what it said last."""
    helper = companion("raise SystemExit('no such version')")
    with pytest.raises(
        RuntimeError, match=r"(?s)answer will not come: the helper ended with 1: .*no such version"
    ):
        wait_for(lambda: None, "answer", (helper,), seconds=60)


def test_it_does_not_wait_for_ever():
    """The message says for what, and how long."""
    with pytest.raises(RuntimeError, match=r"no answer within 0\.1 seconds"):
        wait_for(lambda: None, "answer", (), seconds=0.1)
