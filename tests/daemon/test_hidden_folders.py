"""A folder in the inbox whose name starts with a dot is not learnt, and somebody is told why."""

import signal
import subprocess
import sys
import time

import pytest

from daemon.home import create_home


def test_it_is_told_once_when_nobody_works_in_it_any_more(bench) -> None:
    """A script may fill a hidden folder and rename it when it is done."""
    bench.paint(bench.inbox / ".staging" / "dress" / "0.png")
    assert bench.step() == []
    bench.paint(bench.inbox / ".staging" / "dress" / "1.png")
    assert bench.step(60) == []

    (event,) = bench.step(60)

    assert event.event == "inbox_problem"
    assert event.message.startswith(".staging is ignored because its name starts with a dot; rename it")
    assert bench.step(60) == []
    assert bench.intake.is_idle
    assert [problem.name for problem in bench.intake.problems] == [".staging"]


def test_what_file_servers_and_desktops_keep_there_is_no_news(bench) -> None:
    """Nobody could do anything about it; neither is a hidden file."""
    for name in (".snapshot", ".zfs", ".Trash-1000", ".AppleDouble", "lost+found"):
        (bench.inbox / name / "x").mkdir(parents=True)
    (bench.inbox / ".DS_Store").touch()
    (bench.inbox / ".link").symlink_to("/")

    assert bench.settle() == []
    assert bench.step(3600) == []


@pytest.mark.timeout(60)
def test_what_a_killed_submit_leaves_is_named_for_what_it_is(bench, tmp_path) -> None:
    """Long after a running one would have ended; the sentence says what to submit again and to remove."""
    create_home(bench.home)
    folder = tmp_path / "dress"
    folder.mkdir()
    for number in range(3_000):
        (folder / f"{number}.png").touch()
    command = [sys.executable, "-m", "daemon.cli", "--home", str(bench.home), "submit", str(folder)]
    program = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while program.poll() is None and not list(bench.inbox.glob(".tmp-*/dress")):
        time.sleep(0.005)
    program.send_signal(signal.SIGKILL)
    program.wait()
    (left,) = bench.inbox.iterdir()

    assert bench.settle() == []
    assert bench.step(600) == []
    (event,) = bench.step(600)

    assert event.message == (
        f"{left.name} was left by a `dynlora submit` that was cut short; nothing of it is learnt, and what "
        f"was to be submitted is where it was: submit that again, and remove this with: rm -r {left}"
    )
