"""A worker that was started ahead: it has imported torch and waits to be told its work.

Importing torch is most of what a small batch waits for. So while there is nothing to do, one process stands
by. It holds no lock and knows no home, batch or version; what it is told, in one line on its stdin, is the
command line that a worker started for it would have got. It dies with us like any worker (PDEATHSIG: start it
from the main thread), and by itself when its stdin is closed. Where none stands by, or it is found dead, a
worker is started as ever: nothing depends on it.
"""

import json
import logging
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from daemon import logs
from daemon.supervisor import Worker, start_process
from deploy import disk

PAUSE_SECONDS = 60.0  # before another is started for one that died, doubling: memory may be short
LONGEST_PAUSE_SECONDS = 3600.0


class Standby:
    """At most one process that stands by.

    Args:
        make_command: gives its whole command line.
        log_path: file that its stderr goes to until it is told another one.
    """

    def __init__(self, make_command: Callable[[], list[str]], log_path: Path) -> None:
        self._make_command, self._log_path = make_command, log_path
        self._process: subprocess.Popen[bytes] | None = None
        self._not_before = 0.0
        self._pause_seconds = PAUSE_SECONDS

    @property
    def pid(self) -> int | None:
        """Process id of the one that stands by."""
        return None if self._process is None else self._process.pid

    def keep(self, now: float) -> None:
        """See that one stands by; where one died by itself or cannot be started, another is tried later."""
        if self._process is not None and self._process.poll() is not None:
            code = self._process.returncode
            self.stop()
            self._rest(now, f"it ended with code {code}; {self._log_path} has its last words")
        if self._process is None and now >= self._not_before:
            try:
                disk.unlink(self._log_path, missing_ok=True)  # the last words of one are enough
                self._process = start_process(self._make_command(), self._log_path, stdin=subprocess.PIPE)
            except OSError as error:
                self._rest(now, str(error))

    def take(
        self, arguments: Sequence[str], log_path: Path, *, wake: Callable[[], None] | None = None
    ) -> Worker | None:
        """Give the one that stands by its work; None where none does.

        Args:
            arguments: the worker's, as they would be on its command line.
            log_path: file that its stderr is appended to from now on.
        """
        process, self._process = self._process, None
        if process is None:
            return None
        order = json.dumps({"arguments": list(arguments), "log": str(log_path)}) + "\n"
        try:
            assert process.stdin is not None
            with process.stdin as stdin:
                stdin.write(order.encode())
        except OSError:  # it is dead: the pipe is broken
            _end(process)
            return None
        self._pause_seconds = PAUSE_SECONDS
        return Worker(process, log_path, wake=wake)

    def _rest(self, now: float, why: str) -> None:
        logs.log("no worker stands by", level=logging.WARNING, why=why, next_try_seconds=self._pause_seconds)
        self._not_before = now + self._pause_seconds
        self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)

    def stop(self) -> None:
        """End it at once; it has done nothing that could be lost."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except BrokenPipeError:
                continue  # of an order that it never read
