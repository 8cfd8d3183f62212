"""No file events, too many of them, or those of another folder: every drop is taken all the same."""

import ctypes
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from daemon import watcher
from daemon.watcher import Watcher
from tests.daemon.running.programs import wait_until

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 64003  # a user who has nothing: limits of inotify count by user
LIMIT = Path("/proc/sys/fs/inotify")
IN_Q_OVERFLOW = 0x4000
QUICK = "[inbox]\nsettle_seconds = 0.0\ngather_seconds = 0.2\nscan_seconds = 0.2\n"
# The intake alone, with the real watcher: a daemon that needs no version store.
DAEMON = """
import ctypes, os, sys, threading, time
from pathlib import Path
from PIL import Image
from daemon.config_sources import load_config
from daemon.reception import Reception
from daemon.spool import Spool
from daemon.watcher import Watcher
Image.init()
if len(sys.argv) > 2:  # a user who may not read this checkout any more, and has every inotify instance
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
    while ctypes.CDLL(None).inotify_init1(0) >= 0:
        pass
home = Path(sys.argv[1])
reception = Reception(home, load_config(None, home), tell=lambda *a, **k: None)
with Watcher(home / "inbox", reception.wake) as watcher:
    print("works" if watcher.works else watcher.why_not, flush=True)
    while True:
        reception.tick(time.time())
        time.sleep(0.02)
"""


def start(home: Path, *user: str) -> subprocess.Popen[str]:
    """A process with an intake and a watcher on the home; its first line says whether there are events."""
    command = [sys.executable, "-c", DAEMON, str(home), *user]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ)


def test_a_home_without_a_watch_left_is_looked_at_regularly(make_bench, tmp_path: Path) -> None:
    """Another program of the same user has every inotify instance there is."""
    if os.geteuid() != 0:
        pytest.skip("only root can become a user who has no watches left")
    home = tmp_path / "home"
    home.mkdir()
    bench = make_bench(home)
    (home / "config.toml").write_text(QUICK)
    for path in [*tmp_path.parents, tmp_path]:
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o755)
    for path in [home, *home.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    with start(home, str(NOBODY)) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"{home}/inbox gives no file events (")
        bench.class_folder("cup", under=tmp_path / "made")
        os.chown(tmp_path / "made" / "cup", NOBODY, NOBODY)
        (tmp_path / "made" / "cup").rename(bench.inbox / "cup")
        wait_until(lambda: bench.spool.ids("queued") == ["000001-cup"])
        process.kill()


def raw_watch(folder: Path) -> int:
    """An inotify descriptor on a folder that nobody reads from."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert descriptor >= 0
    assert libc.inotify_add_watch(descriptor, os.fsencode(folder), 0x100 | 0x200) >= 0  # create, delete
    return descriptor


def has_overflowed(descriptor: int) -> bool:
    """Whether the kernel dropped events of this descriptor."""
    try:
        while content := os.read(descriptor, 1 << 20):
            at = 0
            while at < len(content):
                _, mask, _, length = struct.unpack_from("iIII", content, at)
                if mask & IN_Q_OVERFLOW:
                    return True
                at += 16 + length
    except BlockingIOError:
        return False
    return False


def test_what_is_dropped_while_events_overflow_is_taken(make_bench, tmp_path: Path) -> None:
    """The daemon stands still until the kernel throws events away, the drop's own among them."""
    most = int((LIMIT / "max_queued_events").read_text())
    if most > 100_000:
        pytest.skip(f"this system keeps {most:,} events; it takes too long to make more of them")
    home = tmp_path / "home"
    home.mkdir()
    bench = make_bench(home)
    (home / "config.toml").write_text(QUICK.replace("scan_seconds = 0.2", "scan_seconds = 600.0"))
    bench.class_folder("cup", under=tmp_path / "made")
    with start(home) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "works\n"
        witness = raw_watch(bench.inbox)
        process.send_signal(signal.SIGSTOP)
        for _ in range(most // 2 + 10):
            name = bench.inbox / "x"
            os.close(os.open(name, os.O_CREAT))
            name.unlink()
        shutil.move(tmp_path / "made" / "cup", bench.inbox / "cup")
        process.send_signal(signal.SIGCONT)
        assert has_overflowed(witness)
        os.close(witness)
        wait_until(lambda: bench.spool.ids("queued") == ["000001-cup"])
        process.kill()


def test_another_folder_in_the_inbox_s_place_is_watched_in_time(bench, monkeypatch) -> None:
    """Somebody moved the inbox away and made a new one: events of the old one tell nothing."""
    wake = threading.Event()
    monkeypatch.setattr(watcher, "RENEW_SECONDS", 0.0)
    with Watcher(bench.inbox, wake) as watching:
        bench.inbox.rename(bench.home / "old")
        bench.inbox.mkdir()
        watching.renew(1e9)
        assert wake.is_set()
        wait_until(lambda: wake.clear() or not wake.wait(0.2))
        (bench.inbox / "cup").mkdir()

        assert wake.wait(5)
        assert watching.works


def test_a_watch_that_could_not_be_had_is_tried_for_again(bench, monkeypatch, caplog) -> None:
    """Once there is one again, what came meanwhile is looked for; and the trouble is told once."""
    real = watcher.Observer

    def refuse() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(watcher, "Observer", refuse)
    wake = threading.Event()
    with Watcher(bench.inbox, wake) as watching:
        watching.renew(1e9)
        assert not watching.works
        [told] = [record for record in caplog.records if record.message == "no file events"]
        assert "gives no file events (No space left on device)" in str(vars(told))
        monkeypatch.setattr(watcher, "Observer", real)
        watching.renew(2e9)

        assert watching.works
        assert watching.why_not is None
        assert wake.is_set()
