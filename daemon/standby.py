"""A worker that was started ahead: it has imported torch, opened the live version, and waits for its work.

Importing torch is most of what a small batch waits for, opening the version the next. So while there is
nothing to do, one process stands by. It holds no lock of the home and knows no batch; what it is told, in one
line on its stdin, is the command line that a worker started for it would have got, and what it has opened
counts only if that names the same version. It dies with us like any worker (PDEATHSIG: start it from the
main thread), and by itself when its stdin is closed. Where none stands by, or it is found dead, a worker is
started as ever: nothing depends on it.
"""

import json
import logging
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from daemon import logs
from daemon.supervisor import Worker, start_process
from deploy import disk

LOG_NAME = "standby.log"  # in the home, until it is given a batch's
PAUSE_SECONDS = 60.0  # before another is started for one that died, doubling: memory may be short
LONGEST_PAUSE_SECONDS = 3600.0


class Standby:
    """At most one process that stands by, and the start of workers, with it or without.

    Args:
        make_command: the whole command line for given worker arguments.
        home: whose live version it opens.
        wake: called from another thread when a worker says something.
    """

    def __init__(
        self, make_command: Callable[..., list[str]], home: Path, *, wake: Callable[[], None] | None = None
    ) -> None:
        self._make_command, self._home, self._wake = make_command, home, wake
        self._log_path = home / LOG_NAME
        self._process: subprocess.Popen[bytes] | None = None
        self._version: int | None = None
        self._opens = True
        self._not_before = 0.0
        self._pause_seconds = PAUSE_SECONDS

    @property
    def pid(self) -> int | None:
        """Process id of the one that stands by."""
        return None if self._process is None else self._process.pid

    def keep(self, now: float, version: int) -> None:
        """See that one stands by for a live version; where one died or cannot be started, another is tried.

        The next one after a death opens nothing: what it had opened may be what was too much.
        """
        if self._process is not None and self._process.poll() is not None:
            code = self._process.returncode
            self.stop()
            self._opens = False
            self._rest(now, f"it ended with code {code}; {self._log_path} has its last words")
        if self._process is not None and version != self._version:
            self.stop()
        if self._process is None and now >= self._not_before:
            self._version = version
            opening = ("--home", str(self._home)) if self._opens else ()
            try:
                disk.unlink(self._log_path, missing_ok=True)  # the last words of one are enough
                command = self._make_command("standby", *opening)
                self._process = start_process(command, self._log_path, stdin=subprocess.PIPE)
            except OSError as error:
                self._rest(now, str(error))

    def start_worker(self, arguments: Sequence[str], log_path: Path) -> Worker:
        """The one that stands by, or else a new one, with work to do; a new one where torch is not needed.

        Args:
            arguments: the worker's, as they would be on its command line.
            log_path: file that its stderr is appended to from now on.

        Raises:
            OSError: none could be started.
        """
        taken = None if arguments[0] == "rebuild" else self.take(arguments, log_path)
        return taken or Worker(self._make_command(*arguments), log_path, wake=self._wake)

    def take(self, arguments: Sequence[str], log_path: Path) -> Worker | None:
        """Give the one that stands by its work; None where none does. Arguments as of `start_worker`."""
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
        self._pause_seconds, self._opens = PAUSE_SECONDS, True
        return Worker(process, log_path, wake=self._wake)

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
