"""A child process hears SIGTERM: at once where nothing is lost by it, else between two steps."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.supervisor import EXIT_DONE, EXIT_STOPPED

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "import sys, time\nfrom daemon.child import StopFlag\nstop = StopFlag()\n"
SAY_AND_SLEEP = "print('up', flush=True)\ntime.sleep(60)\n"


def end_of(script: str, number: int = signal.SIGTERM) -> int:
    """The exit code of a process that gets the signal once it says that it is up."""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=os.environ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(number)
        return process.wait(timeout=30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_folds_verifies_or_grades_ends_at_once(number: int) -> None:
    """What it was at is done again from what is on the disk."""
    assert end_of(BEGIN + SAY_AND_SLEEP, number) == EXIT_STOPPED


def test_a_process_that_learns_in_steps_is_asked_first() -> None:
    """It ends where it says so, with what it saved."""
    script = (
        "with stop.looked_at():\n"
        "    print('up', flush=True)\n"
        "    while not stop.is_set:\n        time.sleep(0.01)\n"
        "    sys.exit(0)\n"
    )

    assert end_of(BEGIN + script) == EXIT_DONE


def test_a_signal_during_the_last_step_ends_it_after_that() -> None:
    """Not only when the next phase is over."""
    script = (
        "with stop.looked_at():\n"
        "    print('up', flush=True)\n"
        "    while not stop.is_set:\n        time.sleep(0.01)\n"
        "sys.exit(3)\n"
    )

    assert end_of(BEGIN + script) == EXIT_STOPPED
