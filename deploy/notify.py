"""What the service manager hears from the daemon and the server: sd_notify(3), one datagram per message.

Needs no library. Without NOTIFY_SOCKET in the environment nothing here does anything, so nobody need ask who
started the process.
"""

import os
import socket
import time
from collections.abc import Callable, Mapping

MICROSECONDS = 1_000_000
_BEATS_PER_TIMEOUT = 4  # systemd recommends at least 2; more ride out a slow iteration


class Notifier:
    """Speaks to the socket that systemd named.

    Args:
        environ: where NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID are looked up.
        clock: monotonic seconds.
    """

    def __init__(
        self, environ: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._clock = clock
        self._beat_seconds = _watchdog_seconds(environ) / _BEATS_PER_TIMEOUT
        self._beaten_at = float("-inf")
        self._status = ""

    @property
    def is_heard(self) -> bool:
        """Whether a service manager listens."""
        return self._address is not None

    def ready(self) -> None:
        """Said when the start is over, and again when a reload is."""
        self._send("READY=1")

    def reloading(self) -> None:
        """The configuration is being read again; `ready` ends it. systemd 253 asks for the time stamp."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, timeout_seconds: float) -> None:
        """The end has begun and may take so long; systemd's own limit is extended to it."""
        self._send(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={round(timeout_seconds * MICROSECONDS)}")

    def starting(self, timeout_seconds: float) -> None:
        """The start may take so long, for a disk full of leftovers to look through, say."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(timeout_seconds * MICROSECONDS)}")

    def status(self, sentence: str) -> None:
        """One line for `systemctl status`; the same one is not sent twice."""
        line = " ".join(sentence.split())
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def alive(self) -> None:
        """Feed the watchdog. Call it only after real work: an iteration that ended, say."""
        now = self._clock()
        if self._beat_seconds and now - self._beaten_at >= self._beat_seconds:
            self._beaten_at = now
            self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as speaker:
                speaker.settimeout(1.0)
                speaker.sendto(message.encode(), self._address)
        except OSError:
            pass  # a service manager that does not listen must not end the service


def _address(named: str) -> str | bytes | None:
    """The socket's address; `@` stands for the abstract name space's zero byte."""
    if named.startswith("@"):
        return b"\0" + os.fsencode(named[1:])
    return named if named.startswith("/") else None


def _watchdog_seconds(environ: Mapping[str, str]) -> float:
    """The watchdog's timeout; 0 where there is none, or it watches another process."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    microseconds = environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / MICROSECONDS if microseconds.isdecimal() else 0.0
