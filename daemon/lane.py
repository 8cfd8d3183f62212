"""The lane for large drops: one process takes in one claimed drop, and small ones overtake it.

Knows the process's messages and nothing of what it does with the drop. What is kept here may be lost at any
moment: a drop that is still in incoming/ is given to another process.
"""

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from daemon import logs
from daemon.claim import read_claim, write_claim
from daemon.errors import InboxError
from daemon.spool import Spool
from daemon.supervisor import EXIT_DONE, EXIT_STOPPED, Worker, start_process
from daemon.taking import IntakeEvent
from deploy import disk
from deploy.errors import StoreError

LOG_NAME = "intake.log"  # in the home: the last words of the last such process
SILENT_SECONDS = 900.0  # without a file read or flushed: it hangs, and is killed
STOP_SECONDS = 5.0
REST_SECONDS = 30.0  # before a drop is tried again, after a full disk or a death
TOLD_SECONDS = 10.0  # between two lines of progress in the log


class Lane:
    """At most one process at a time.

    Attributes:
        is_deciding: nobody else may decide about a drop now.
        waits: why the last drop is not in yet and is tried again, such as a full disk.
    """

    def __init__(
        self, home: Path, *, config_path: Path | None = None, wake: Callable[[], None] = lambda: None
    ) -> None:
        self._home, self._config_path, self._wake = home, config_path, wake
        self._worker: Worker | None = None
        self._stdin: IO[bytes] | None = None
        self._batch = ""
        self._progress: dict[str, Any] = {}
        self._heard_at = self._told_at = 0.0
        self._rests_until = float("-inf")
        self.is_deciding = False
        self.waits: str | None = None

    @property
    def progress(self) -> dict[str, Any] | None:
        """The drop at hand, `phase`, and where known `step` of `steps`; None while there is none."""
        return None if self._worker is None else {"batch": self._batch, **self._progress}

    def is_free(self, now: float) -> bool:
        """Whether a drop may be started."""
        return self._worker is None and not self._rests_until - REST_SECONDS <= now < self._rests_until

    def start(self, batch: str, now: float) -> None:
        """Give a claimed drop to a new process; one that cannot be started is tried again later."""
        command = [sys.executable, "-m", "daemon.intake_process", "--parent-pid", str(os.getpid())]
        command += ["--home", str(self._home), "--config", str(self._config_path or ""), "--batch", batch]
        log_path = self._home / LOG_NAME
        try:
            disk.unlink(log_path, missing_ok=True)
            process = start_process(command, log_path, stdin=subprocess.PIPE)
        except OSError as error:
            self._wait(f"no process to take in {batch} could be started: {error.strerror}", now)
            return
        self._stdin, self._batch = process.stdin, batch  # `waits` stays: it is not told anew with every try
        self._worker = Worker(process, log_path, wake=self._wake)
        self._progress, self._heard_at = {"phase": "start"}, time.monotonic()
        logs.log("taking in", batch=batch, pid=process.pid)

    def observe(self, now: float) -> list[IntakeEvent]:
        """Hear the process; returns what happened to its drop.

        Raises:
            StoreError: the home cannot be used, which is no fault of the drop.
        """
        worker = self._worker
        if worker is None:
            return []
        code = worker.poll()
        events = [event for message in worker.messages() if (event := self._hear(message)) is not None]
        if code is not None:
            self._ended(worker, code, now, is_told=bool(events))
        elif time.monotonic() - self._heard_at > SILENT_SECONDS:
            worker.kill()
            self._tell_end(f"it hung in phase {self._progress.get('phase')!r} and was killed")
            self._close()
            self._rests_until = now + REST_SECONDS
        return events

    def _hear(self, message: dict[str, Any]) -> IntakeEvent | None:
        self._heard_at = time.monotonic()
        event = message.pop("event")
        if event == "told":
            return IntakeEvent(message["name"], message["message"], message["batch"])
        if event == "waits":
            self.waits = str(message["why"])
        elif event == "examined":
            self.is_deciding = True
            assert self._stdin is not None
            try:
                self._stdin.write(b"\n")
                self._stdin.flush()
            except BrokenPipeError:
                return None  # it is dead, which is seen next
        elif event == "phase":
            self._progress = message
            self.is_deciding &= message.get("phase") != "move"  # batch.json is there
        elif event == "step":
            self._progress |= message
            if self._heard_at - self._told_at >= TOLD_SECONDS:
                self._told_at = self._heard_at
                logs.log("taking in", batch=self._batch, **self._progress)
        return None

    def _ended(self, worker: Worker, code: int, now: float, *, is_told: bool) -> None:
        self._close()
        if code == EXIT_DONE and not is_told and self.waits is not None:
            self._wait(self.waits, now)
            return
        self.waits = None
        if code not in (EXIT_DONE, EXIT_STOPPED):
            why = worker.why_it_failed(code).replace("the worker", f"the process that takes in {self._batch}")
            self._rests_until = now + REST_SECONDS
            if worker.error is not None:
                raise StoreError(why)
            self._tell_end(why)

    def _tell_end(self, why: str) -> None:
        logs.log("intake process ended", level=logging.WARNING, batch=self._batch, why=why)

    def _wait(self, why: str, now: float) -> None:
        self.waits, self._rests_until = why, now + REST_SECONDS

    def stop(self, should_force: Callable[[], bool] = lambda: False) -> None:
        """Ask the process to end, then make it. That we killed it says nothing about its drop."""
        worker = self._worker
        if worker is None:
            return
        code = worker.stop(STOP_SECONDS, should_force)
        self._close()
        directory = Spool(self._home).state_dir("incoming") / self._batch
        if code < 0 and directory.is_dir():
            try:
                claim = read_claim(directory)
                write_claim(claim.model_copy(update={"attempts": max(0, claim.attempts - 1)}), directory)
            except (InboxError, OSError) as error:
                logs.log("attempt not taken back", level=logging.WARNING, batch=self._batch, why=str(error))

    def _close(self) -> None:
        self._worker, self.is_deciding = None, False
        if self._stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # of leave that it never took
                self._stdin.close()
            self._stdin = None
