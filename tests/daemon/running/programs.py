"""Helpers of the command line's tests: the program as a process of its own."""

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
STANDIN = Path(__file__).with_name("standin_worker.py")


def behave(home, **behaviour):
    """Tell the stand-in worker how to behave."""
    (home / "behaviour.json").write_text(json.dumps(behaviour))


def start_daemon(home, *, once=False, log=subprocess.PIPE):
    """`dynlora run` as a process of its own, with the stand-in worker.

    Args:
        log: an open file for what it says, where that may be more than a pipe holds.
    """
    code = (
        "import functools, sys; from daemon import cli, loop; from daemon.lifecycle import Launch;"
        f"make = lambda *a: [sys.executable, {str(STANDIN)!r}, *a];"
        "loop.Launch = functools.partial(Launch, make_command=make); cli.main(sys.argv[1:])"
    )
    arguments = ["run", "--home", str(home), *(["--once"] if once else [])]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        stderr=log,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_until(is_true, seconds=30):
    """Wait for a condition, not for a time."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
