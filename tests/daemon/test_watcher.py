"""Events hasten the scan; without them it still comes."""

import threading
import time
from pathlib import Path

import pytest
from watchdog.observers import Observer

from daemon.inbox import scan_inbox
from daemon.watcher import Watcher


def test_a_drop_wakes_the_daemon(bench, tmp_path: Path) -> None:
    """A folder made in the inbox, and one renamed in."""
    bench.class_folder("dress", under=tmp_path)
    wake = threading.Event()
    with Watcher(bench.inbox, wake) as watcher:
        assert watcher.works
        (bench.inbox / "hat").mkdir()
        assert wake.wait(5)
        time.sleep(0.2)
        wake.clear()
        (tmp_path / "dress").rename(bench.inbox / "dress")
        assert wake.wait(5)


def test_our_own_scans_do_not_wake_us(bench) -> None:
    """Or the daemon would never sleep again."""
    bench.class_folder("dress")
    wake = threading.Event()
    with Watcher(bench.inbox, wake):
        time.sleep(0.2)
        wake.clear()
        for now in range(3):
            scan_inbox(bench.inbox, now)

        assert not wake.wait(0.3)


def test_nothing_is_left_running(bench) -> None:
    """The watcher's threads end with it."""
    before = threading.active_count()
    with Watcher(bench.inbox, threading.Event()):
        assert threading.active_count() > before

    assert threading.active_count() == before


def test_a_system_without_watches_left_is_not_an_error(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scans do alone."""

    def refuse(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "inotify watch limit reached")

    monkeypatch.setattr(Observer, "start", refuse)
    with Watcher(bench.inbox, threading.Event()) as watcher:
        assert not watcher.works
