"""Everything that changes a home goes through deploy/disk.py, shown by the system calls of a whole life."""

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter

import pytest

from daemon.lock import holder
from tests.e2e.conftest import DYNLORA, IMAGES, ROOT, Home, environment, wait_until
from tests.e2e.trace import strace

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


@pytest.fixture
def traced(tmp_path):
    """A function that runs a program in a home and tells what it and its children did there."""
    probe = ["strace", "-f", "--seccomp-bpf", "-e", "trace=rename", "-o", "/dev/null", "true"]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"nothing can be traced here: {done.stderr.strip()}")

    def run(home, *command, **options):
        room = tmp_path / f"trace-{len(list(tmp_path.glob('trace-*')))}"
        env = environment() | {"PYTHONPATH": str(ROOT)}
        return strace(command, room, home, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, **options)

    return run


@needs_strace
@pytest.mark.parametrize(
    "change",
    [
        "(home / 'a').touch()",
        "(home / 'b').mkdir()",
        "os.rename(home / 'there', home / 'c')",
        "os.unlink(home / 'there')",
        "os.symlink('there', home / 'd')",
        "os.link(home / 'there', home / 'e')",
        "os.truncate(home / 'there', 0)",
        "os.fsync(os.open(home / 'there', os.O_RDONLY))",
        "os.write(disk.open_file(home / 'there', os.O_WRONLY), b'x')",
        "shutil.copyfile(home / 'there', home / 'f')",
        "shutil.rmtree(home / 'folder')",
        "(home / 'folder' / 'inner').rmdir()",
    ],
)
def test_a_change_that_goes_around_is_seen(tmp_path, traced, change):
    """Of every kind, and beside one that does not."""
    home = tmp_path / "home"
    (home / "folder" / "inner").mkdir(parents=True)
    (home / "there").write_text("there")
    script = (
        "import os, shutil\nfrom pathlib import Path\nfrom deploy import disk\n"
        f"home = Path({str(home)!r})\ndisk.mkdir(home / 'by the door')\n{change}\n"
    )
    trace = traced(home, sys.executable, "-c", script)

    assert trace.around
    assert any(call.startswith("mkdir") for call in trace.within)
    assert not any("by the door" in line for line in trace.around)


@needs_strace
@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_no_system_call_that_changes_a_home_goes_around_the_door(tmp_path, traced):
    """From init to forget: the daemon, its real workers and the commands, with all their threads.

    Left out is what is written to a worker's log, its stderr, which the door opens. What lies elsewhere, such
    as torch's temporary files, is no part of a home.
    """
    path = tmp_path / "home"
    traces = [traced(path, *DYNLORA, "init", str(path))]
    home = Home(path)

    def live(*command, code=0, **options):
        traces.append(traced(path, *DYNLORA, *command, "--home", str(path), code=code, **options))

    (tmp_path / "bad" / "cup").mkdir(parents=True)
    (tmp_path / "bad" / "cup" / "0.png").write_bytes(b"a letter")
    live("submit", str(next((IMAGES / "drop").glob("*/shoes"))))
    live("run", "--once")
    live("submit", shutil.make_archive(str(tmp_path / "food"), "zip", IMAGES / "drop" / "groceries"))
    live("run", meanwhile=lambda: stop_at(home, 2))
    live("submit", str(tmp_path / "bad"))
    live("run", "--once", code=1)
    [failed] = home.spool.ids("failed")
    live("retry", failed)
    live("run", "--once", code=1)
    live("discard", failed)
    # Held for too small a gain: more than two steps bring, and less than all, so that there is room for it.
    home.configure(steps=2, min_gain=0.4, exam=0.6)
    live("submit", str(next((IMAGES / "drop").glob("*/hat"))))
    live("run", "--once", code=3)
    live("promote", *home.spool.ids("held"))
    for command in ("rollback --to 1", "unpin", "rollback --to 3", "unpin", "pause", "resume"):
        live(*command.split())
    first, second, _ = home.spool.ids("done")
    live("revert", second, "--insist")
    for command in ("thin 1", "rebuild 1", "prune --keep 1", f"forget {first}"):
        live(*command.split())

    around = [line for trace in traces for line in trace.around if ".log>" not in line]
    within = sum((trace.within for trace in traces), start=Counter())
    print(f"{sum(within.values())} system calls through the door: {dict(within.most_common())}")
    assert around == []
    assert home.store.versions() == [0, 1, 2, 3, 4]
    assert within["fsync"] > 300
    assert within["rename"] > 100
    assert len(within) > 8


def stop_at(home, version):
    """Wait until a version is live, then ask the daemon to stop."""
    wait_until(lambda: home.store.current() == version and holder(home.path), seconds=250)
    os.kill(holder(home.path), signal.SIGTERM)
