"""MLflow hears of each batch that was decided: a note in the home, and a process that logs it.

Nothing here can make the daemon wait or fail, and mlflow is not imported: the process is killed when it
gives no sign of progress, and what could not be logged is tried again later, after a restart too. Why is
told once in the log, and stands in the status until it works again.
"""

import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from daemon import logs
from daemon.config import MlflowConfig
from daemon.errors import TrackingError
from daemon.part import Part
from daemon.run_notes import Note, note_of, noted, read_note, remove_note, write_note
from daemon.supervisor import EXIT_DONE, Worker, start_process
from deploy import disk

LOG_NAME = "mlflow.log"  # in the home: what the client said the last time
NOT_INSTALLED = (
    "mlflow.tracking_uri is set, but the Python package mlflow is not installed; "
    "pip install 'dynlora[mlflow]'"
)
_REST_AT_MOST_SECONDS = 3600.0
Tell = Callable[..., None]


def is_installed() -> bool:
    """Whether the client is there, found without importing it."""
    importlib.invalidate_caches()  # it may have been installed since
    return importlib.util.find_spec("mlflow") is not None


class Tracking:
    """Logs the runs of one home.

    Args:
        tell: called with an event's name and fields, from `tick` only.
    """

    def __init__(self, home: Path, config: MlflowConfig, tell: Tell) -> None:
        self._home, self._config, self._tell = home, config, tell
        self._part = Part(about=lambda: {"what": "mlflow"}, at_most_seconds=_REST_AT_MOST_SECONDS)
        self._worker: Worker | None = None
        self._heard_at = 0.0
        self._unwritten: dict[str, Note] = {}  # notes that the disk did not take
        self._waiting: list[str] | None = None  # batches with a note; None: not looked yet
        self._is_installed = False

    @property
    def trouble(self) -> str | None:
        """Why runs are not logged at the moment, in a sentence; None when all is well or nothing is to be."""
        if not self._config.tracking_uri or self._part.trouble is None:
            return None
        count = self.waiting
        waiting = f"; {count} {'batch waits' if count == 1 else 'batches wait'} to be logged" if count else ""
        return f"{self._part.trouble}{waiting}"

    @property
    def waiting(self) -> int:
        """How many decided batches have no run yet; 0 where none is to have one."""
        return len({*(self._waiting or ()), *self._unwritten}) if self._config.tracking_uri else 0

    def reconfigure(self, config: MlflowConfig) -> None:
        """The next process logs there; what was in the way may be out of it."""
        if config != self._config:
            self._config = config
            self._part.wake()

    def told(self, event: str, fields: Mapping[str, Any]) -> None:
        """Note a batch, if the event ended one."""
        note = note_of(self._config, event, fields)
        if note is not None:
            self._unwritten[note.batch] = note
            self._write_notes()

    def is_idle(self) -> bool:
        """Whether all runs are logged, or cannot be at the moment."""
        is_stuck = not self._config.tracking_uri or self._part.trouble is not None
        return self._worker is None and (is_stuck or not (self._unwritten or self._waiting))

    def tick(self, now: float) -> None:
        """Start the process where there is something to log, or see how far it is."""
        if self._unwritten:
            self._write_notes()
        if self._worker is not None:
            self._part.attempt(self._observe, now)
        elif self._config.tracking_uri:
            self._part.attempt(self._start, now)

    def stop(self) -> None:
        """The daemon ends; a run that is cut short is made anew after the next start."""
        for batch_id in self._unwritten:
            logs.log("run will not be logged", level=logging.WARNING, what="mlflow", batch=batch_id)
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def _write_notes(self) -> None:
        """Those that a full disk does not take are tried again with the next round of the loop."""
        with contextlib.suppress(OSError):
            for batch_id in list(self._unwritten):
                write_note(self._home, self._unwritten[batch_id])
                del self._unwritten[batch_id]
            self._waiting = noted(self._home)

    def _start(self) -> None:
        """Raises TrackingError where there is no client."""
        if self._waiting is None:
            self._waiting = noted(self._home)
        if not self._is_installed or self._waiting:  # it may have been removed since
            self._is_installed = is_installed()
            if not self._is_installed:
                raise TrackingError(NOT_INSTALLED)
        if not self._waiting:
            return
        command = [sys.executable, "-m", "daemon.tracking_process", "--parent-pid", str(os.getpid())]
        command += ["--home", str(self._home), "--uri", self._config.tracking_uri]
        command += ["--experiment", self._config.experiment]
        log_path = self._home / LOG_NAME
        disk.unlink(log_path, missing_ok=True)
        self._worker = Worker(start_process(command, log_path), log_path)
        self._heard_at = time.monotonic()

    def _observe(self) -> None:
        """Hear the process; raises TrackingError where it failed."""
        worker, limit = self._worker, self._config.timeout_seconds
        assert worker is not None
        code = worker.poll()
        for message in worker.messages():
            self._heard_at = time.monotonic()
            self._hear(message)
        is_late = code is None and time.monotonic() - self._heard_at > limit
        if is_late:
            worker.kill()
        if is_late or code is not None:
            self._worker, self._waiting = None, noted(self._home)
        if is_late:
            why = f"gave no answer within {limit:g} s (mlflow.timeout_seconds)"
            raise TrackingError(f"{self._config.tracking_uri} {why}")
        if code not in (None, EXIT_DONE):
            raise TrackingError(worker.why_it_failed(code).replace("the worker", "the mlflow process"))

    def _hear(self, message: Mapping[str, Any]) -> None:
        event, batch_id = message["event"], str(message.get("batch"))
        if event == "logged":
            self._part.forget()
            self._tell("mlflow_logged", batch=batch_id, run=message["run"], decision=message["decision"])
        elif event == "refused":
            self._tell("mlflow_refused", logging.WARNING, batch=batch_id, why=message["why"])
        if event in ("logged", "refused", "gone"):
            note = read_note(self._home, batch_id)
            # A batch that was promoted meanwhile has another note by now.
            if note is None or message.get("decision") in (None, note.decision):
                remove_note(self._home, batch_id)
                self._waiting = [other for other in self._waiting or () if other != batch_id]
