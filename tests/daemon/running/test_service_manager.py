"""A real daemon under something that listens as systemd does: ready, status, watchdog, reload, end."""

import json
import signal
import socket

import pytest

from tests.daemon.running.conftest import QUICK_TOML, draw_class
from tests.daemon.running.programs import behave, start_daemon, wait_until


class Manager:
    """The socket that systemd would hold, and what was said on it."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(30)
        self.said = []

    def until(self, *starts):
        """Listen until lines that start so were said, in this order; returns the last."""
        for start in starts:
            while True:
                lines = self.socket.recv(4096).decode().split("\n")
                self.said += lines
                if found := next((line for line in lines if line.startswith(start)), None):
                    break
        return found


@pytest.fixture
def manager(tmp_path, monkeypatch):
    """A service manager whose environment the daemon inherits; its watchdog bites after two seconds."""
    manager = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    yield manager
    manager.socket.close()


def events(home, name):
    """The events of that name so far."""
    lines = (home / "events.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == name]


def test_a_service_manager_hears_ready_what_goes_on_and_the_end(manager, running, quick_home):
    """READY once it says what it does, the batch and its step, the watchdog, STOPPING and its time."""
    assert manager.until("STATUS=idle") == "STATUS=idle; serving version 0"
    manager.until("READY=1")
    behave(quick_home, steps=100)
    draw_class(quick_home / "inbox" / "teapot")
    line = manager.until("STATUS=batch 000001-teapot: step")
    assert line.endswith("; serving version 0")
    manager.until("WATCHDOG=1", "WATCHDOG=1")

    running.send_signal(signal.SIGTERM)
    manager.until("STOPPING=1")
    assert any(line.startswith("EXTEND_TIMEOUT_USEC=9") for line in manager.said)
    assert running.wait(timeout=30) == 0


def test_a_reload_changes_what_can_change_and_names_what_cannot(manager, running, quick_home):
    """RELOADING with its time stamp, then READY; the event lists both kinds of keys."""
    manager.until("READY=1")
    elsewhere = quick_home.parent / "elsewhere"
    elsewhere.mkdir()
    changed = QUICK_TOML.replace("max = 1", "max = 2").replace("[inbox]", f'[inbox]\npath = "{elsewhere}"')
    (quick_home / "config.toml").write_text(changed + "[log]\nlevel = 'debug'\n")
    running.send_signal(signal.SIGHUP)
    manager.until("MONOTONIC_USEC=", "READY=1")

    [event] = events(quick_home, "reloaded")
    assert event["changed"] == ["attempts.max", "log.level"]
    assert event["after_restart"] == ["inbox.path"]


def test_a_reload_of_a_broken_configuration_changes_nothing(manager, running, quick_home):
    """The daemon says so, stays ready, and learns as before."""
    manager.until("READY=1")
    (quick_home / "config.toml").write_text("[inbox]\nsetle_seconds = 1\n")
    running.send_signal(signal.SIGHUP)
    manager.until("RELOADING=1", "READY=1")
    assert events(quick_home, "reloaded") == []

    (quick_home / "config.toml").write_text(QUICK_TOML)
    draw_class(quick_home / "inbox" / "teapot")
    wait_until(lambda: events(quick_home, "published"))
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=30)
    assert "reload refused" in said
    assert "inbox.settle_seconds" in said


def test_settings_taken_over_at_a_reload_judge_the_next_drop(manager, running, quick_home):
    """A class needs twelve images from now on."""
    manager.until("READY=1")
    text = QUICK_TOML.replace("[inbox]", "[inbox]\nmin_images_per_class = 12")
    (quick_home / "config.toml").write_text(text)
    running.send_signal(signal.SIGHUP)
    wait_until(lambda: events(quick_home, "reloaded"))
    draw_class(quick_home / "inbox" / "teapot", count=10)

    wait_until(lambda: events(quick_home, "failed"))
    assert "12" in events(quick_home, "failed")[0]["why"]


def test_nohup_is_respected(quick_home, tmp_path):
    """Where SIGHUP was ignored before we came, it stays ignored: no reload, no end."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start_daemon(quick_home)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_until((quick_home / "status.json").exists)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)

    assert events(quick_home, "reloaded") == []
    assert events(quick_home, "stopped")
