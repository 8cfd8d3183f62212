"""A worker that was started ahead, against real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from daemon.standby import PAUSE_SECONDS, Standby
from daemon.supervisor import default_command

ECHO = (
    "import json, os, sys; line = sys.stdin.readline(); line or sys.exit(75);"
    'print(json.dumps({"event": "order", "pid": os.getpid(), **json.loads(line)}), flush=True)'
)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def stand(tmp_path):
    """Make a Standby that runs a piece of Python; ended with the test."""
    made = []

    def stand(code):
        made.append(Standby(lambda *arguments: [sys.executable, "-c", code, *arguments], tmp_path))
        return made[-1]

    yield stand
    for standby in made:
        standby.stop()


def wait_for(condition, seconds=60):
    """Wait until it holds, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_gone(pid):
    """Whether no process of that id runs any more (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_the_one_that_stands_by_does_the_work_it_is_told(stand, tmp_path):
    """The same process, with the arguments of a command line; after that none stands by."""
    standby = stand(ECHO)
    standby.keep(0.0, 0)
    pid = standby.pid
    worker = standby.take(["adapt", "--batch", "ä b"], tmp_path / "worker.log")
    wait_for(lambda: worker.poll() is not None)

    assert worker.poll() == 0
    [message] = worker.messages()
    assert (message["pid"], message["arguments"]) == (pid, ["adapt", "--batch", "ä b"])
    assert standby.pid is None
    assert standby.take([], tmp_path / "worker.log") is None


def test_only_one_stands_by(stand):
    """Looking again starts no second one."""
    standby = stand(ECHO)
    standby.keep(0.0, 0)
    pid = standby.pid
    standby.keep(1.0, 0)

    assert standby.pid == pid


def test_one_that_died_is_replaced_after_a_pause_that_grows(stand):
    """A machine that kills it for its memory is not asked again and again."""
    standby = stand("import sys; sys.exit(3)")
    standby.keep(0.0, 0)
    wait_for(lambda: is_gone(standby.pid))
    standby.keep(1.0, 0)
    assert standby.pid is None
    standby.keep(PAUSE_SECONDS, 0)
    assert standby.pid is None
    standby.keep(1.0 + PAUSE_SECONDS, 0)
    wait_for(lambda: is_gone(standby.pid))
    standby.keep(100.0, 0)
    standby.keep(100.0 + PAUSE_SECONDS, 0)

    assert standby.pid is None
    standby.keep(100.0 + 2 * PAUSE_SECONDS, 0)
    assert standby.pid is not None


def test_one_that_is_found_dead_gives_no_worker(stand, tmp_path):
    """Whoever asked starts a worker as ever, and it is no attempt of the batch."""
    standby = stand("pass")
    standby.keep(0.0, 0)
    wait_for(lambda: is_gone(standby.pid))

    assert standby.take(["adapt"], tmp_path / "worker.log") is None


def test_one_that_cannot_be_started_stops_nothing(tmp_path):
    """The batch that comes is learnt by a worker of its own."""
    standby = Standby(lambda *_: ["/nowhere/python"], tmp_path)
    standby.keep(0.0, 0)

    assert standby.pid is None
    assert standby.take([], tmp_path / "worker.log") is None


def test_the_real_one_ends_with_its_daemon(tmp_path):
    """Killed, the daemon leaves no process behind."""
    code = (
        "import sys, time; from pathlib import Path; from daemon.standby import Standby;"
        "from daemon.supervisor import default_command;"
        "s = Standby(default_command, Path(sys.argv[1])); s.keep(0.0, 0);"
        "print(s.pid, flush=True); time.sleep(600)"
    )
    daemon = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    pid = int(daemon.stdout.readline())
    daemon.kill()
    daemon.wait()
    daemon.stdout.close()
    wait_for(lambda: is_gone(pid))


def test_one_that_stands_by_for_another_version_is_replaced(stand):
    """What it has opened is of no use any more, and keeps that version from being pruned."""
    standby = stand(ECHO)
    standby.keep(0.0, 1)
    pid = standby.pid
    standby.keep(1.0, 2)

    assert standby.pid not in (None, pid)
    assert is_gone(pid)


def test_after_one_that_died_the_next_opens_nothing_until_one_has_had_its_order(tmp_path):
    """What was opened may be what was too much for the machine."""
    asked, codes = [], iter(["raise SystemExit(9)", ECHO, ECHO])

    def make_command(*arguments):
        asked.append(arguments)
        return [sys.executable, "-c", next(codes)]

    standby = Standby(make_command, tmp_path)
    standby.keep(0.0, 0)
    wait_for(lambda: is_gone(standby.pid))
    standby.keep(1.0, 0)
    standby.keep(1.0 + PAUSE_SECONDS, 0)
    worker = standby.take(["adapt"], tmp_path / "worker.log")
    wait_for(lambda: worker.poll() is not None)
    standby.keep(2.0 + PAUSE_SECONDS, 0)
    standby.stop()

    opening = ("standby", "--home", str(tmp_path))
    assert asked == [opening, ("standby",), opening]


def test_a_worker_without_torch_leaves_the_one_that_stands_by_alone(stand, tmp_path):
    """A rebuild is soon started, and the next batch finds torch imported."""
    standby = stand(ECHO)
    standby.keep(0.0, 0)
    pid = standby.pid
    worker = standby.start_worker(["rebuild", "--version", "1"], tmp_path / "worker.log")
    worker.kill()

    assert (standby.pid, worker.pid != pid) == (pid, True)


def test_the_real_one_takes_an_order_and_tells_what_is_wrong_in_the_log_it_was_given(tmp_path):
    """An order is parsed like a command line; its last words are where the batch's are looked for.

    The home has no version that could be opened ahead: a line in the log, no more.
    """
    standby = Standby(default_command, tmp_path)
    standby.keep(0.0, 0)
    worker = standby.take(["adapt", "--nonsense"], tmp_path / "worker.log")
    wait_for(lambda: worker.poll() is not None, seconds=120)

    assert worker.poll() == 2
    assert "the live version was not opened ahead: " in (tmp_path / "standby.log").read_text()
    assert "--nonsense" in (tmp_path / "worker.log").read_text() or "required" in worker.why_it_failed(2)


def test_ctrl_c_leaves_the_real_one_to_its_daemon_which_closes_its_stdin():
    """SIGINT goes to the whole foreground group; the daemon decides what becomes of the worker."""
    process = subprocess.Popen(
        default_command("standby"), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    status = Path(f"/proc/{process.pid}/status")

    def ignores_sigint():
        mask = next(line for line in status.read_text().splitlines() if line.startswith("SigIgn"))
        return int(mask.split()[1], 16) & (1 << (signal.SIGINT - 1))

    wait_for(ignores_sigint)
    os.kill(process.pid, signal.SIGINT)
    process.stdin.close()

    assert process.wait(120) == 75
    process.stdout.close()
