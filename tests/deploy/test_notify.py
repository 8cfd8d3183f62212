"""What systemd is told, heard on a real socket."""

import os
import socket
from pathlib import Path

import pytest

from deploy.notify import Notifier


class Clock:
    """A clock that is turned by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path: Path):
    """A listening service manager and the NOTIFY_SOCKET it would set."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        if request.param == "path":
            named = address = str(tmp_path / "notify")
        else:
            named, address = f"@dynlora-test-{os.getpid()}", f"\0dynlora-test-{os.getpid()}"
        listener.bind(address)
        listener.settimeout(5)
        yield listener, named


def heard(listener: socket.socket) -> list[str]:
    """All messages that lie there."""
    messages = []
    listener.setblocking(False)
    try:
        while True:
            messages.append(listener.recv(4096).decode())
    except BlockingIOError:
        return messages


def test_every_message_has_the_words_that_systemd_documents(manager):
    """One datagram each, in the order they were said."""
    listener, named = manager
    notifier = Notifier({"NOTIFY_SOCKET": named})
    notifier.starting(30)
    notifier.ready()
    notifier.reloading()
    notifier.stopping(12.5)

    start, ready, reloading, stopping = heard(listener)

    assert start == "EXTEND_TIMEOUT_USEC=30000000"
    assert ready == "READY=1"
    first, stamp = reloading.split("\n")
    assert first == "RELOADING=1"
    assert stamp.removeprefix("MONOTONIC_USEC=").isdecimal()
    assert stopping == "STOPPING=1\nEXTEND_TIMEOUT_USEC=12500000"


def test_the_same_status_is_sent_once_and_stays_on_one_line(manager):
    """A loop may say it every time round."""
    listener, named = manager
    notifier = Notifier({"NOTIFY_SOCKET": named})
    for sentence in ("version 3 is live", "version 3 is live", "two\nlines", "version 3 is live"):
        notifier.status(sentence)

    assert heard(listener) == ["STATUS=version 3 is live", "STATUS=two lines", "STATUS=version 3 is live"]


def test_the_watchdog_is_fed_well_within_its_time_and_not_at_every_call(manager):
    """Four times per timeout, by the monotonic clock."""
    listener, named = manager
    clock = Clock()
    notifier = Notifier({"NOTIFY_SOCKET": named, "WATCHDOG_USEC": "20000000"}, clock)
    for clock.now in (0.0, 1.0, 4.9, 5.0, 9.0, 10.0):
        notifier.alive()

    assert heard(listener) == ["WATCHDOG=1"] * 3


@pytest.mark.parametrize(
    "environ", [{"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "often"}, {}]
)
def test_a_watchdog_that_watches_somebody_else_is_not_fed(manager, environ):
    """A worker inherits our environment, but not our duty."""
    listener, named = manager
    Notifier({"NOTIFY_SOCKET": named} | environ).alive()

    assert heard(listener) == []


def test_without_a_service_manager_nothing_happens_and_nothing_fails(tmp_path):
    """Neither where none is named, nor where the named one is gone."""
    for environ in ({}, {"NOTIFY_SOCKET": str(tmp_path / "gone")}, {"NOTIFY_SOCKET": "vsock:2:1234"}):
        notifier = Notifier(environ)
        notifier.ready()
        notifier.status("fine")
