"""What every child process of the daemon does: say things in JSON lines, hear SIGTERM, end with its parent.

The other side is `daemon.supervisor`. Imports nothing heavy.
"""

import ctypes
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from daemon.supervisor import EXIT_STOPPED
from deploy import disk

_PR_SET_PDEATHSIG = 1
_LOCK_WAIT_SECONDS = 60


class Outlet:
    """Says things to the daemon: one JSON object per line on stdout."""

    def __init__(self) -> None:
        # A library that prints must not end up between our lines: its stdout becomes stderr.
        self._stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._last_step = 0.0

    def say(self, event: str, **fields: Any) -> None:
        """Send one message."""
        self._stream.write(json.dumps({"event": event, **fields}) + "\n")
        self._stream.flush()

    def phase(self, name: str) -> None:
        """Say what is being done now."""
        self.say("phase", phase=name)

    def tensors(self, done: int, count: int) -> None:
        """Report how many tensors of a fold are done."""
        self.step(step=done + 1, steps=count)

    def step(self, **fields: Any) -> None:
        """Report a step of what is counted in steps, at most ten a second and always the last."""
        now = time.monotonic()
        if now - self._last_step >= 0.1 or fields["step"] == fields["steps"]:
            self._last_step = now
            self.say("step", **fields)


class StopFlag:
    """What SIGTERM and SIGINT do: end the process at once, or where it works in steps, set a flag.

    To end at once is as safe as a power cut, after which all is done again that is not on the disk.

    Attributes:
        is_set: a signal came.
        is_looked_at: somebody looks at the flag between steps, and has something to save.
    """

    def __init__(self, *, is_looked_at: bool = False) -> None:
        self.is_set, self.is_looked_at = False, is_looked_at
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._set)

    @contextmanager
    def looked_at(self) -> Iterator[None]:
        """Within the block signals only set the flag; one that nobody saw ends the process after it."""
        self.is_looked_at = True
        try:
            yield
        finally:
            self.is_looked_at = False
        if self.is_set:
            os._exit(EXIT_STOPPED)

    def _set(self, *_: object) -> None:
        self.is_set = True
        if not self.is_looked_at:
            os._exit(EXIT_STOPPED)


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel for SIGKILL when the daemon ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before we asked
        sys.exit(EXIT_STOPPED)


@contextmanager
def alone(home: Path, name: str) -> Iterator[None]:
    """Hold a lock of the home: a successor waits until its predecessor is really gone.

    Raises:
        OSError: it did not go.
    """
    with os.fdopen(disk.open_file(home / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as lock:
        deadline = time.monotonic() + _LOCK_WAIT_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise OSError(
                        f"another process has held {home / name} for {_LOCK_WAIT_SECONDS} s; is one stuck?"
                    ) from None
                time.sleep(0.05)
        yield
