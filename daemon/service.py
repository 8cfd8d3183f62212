"""The daemon of one home, one iteration per call: requests, inbox, worker, gate. The clock comes from
outside.

Knows the order of things; each of them lives in a module of its own.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from daemon import logs, operations, retention
from daemon.config import Config
from daemon.errors import DaemonError
from daemon.events import EventLog
from daemon.lifecycle import Launch, Lifecycle
from daemon.progress import View
from daemon.publish import Publisher
from daemon.reception import Reception
from daemon.recovery import missing_events
from daemon.requests import Answer, Request, execute_pending
from daemon.spool import STATES, Spool
from daemon.status import StatusFile, pin_fields
from deploy.errors import DeployError
from deploy.store import VersionStore

TROUBLE_SECONDS = 10.0  # how long to leave a full or broken disk alone before the next try
TROUBLE_SECONDS_AT_MOST = 320.0  # the wait doubles up to this while the same trouble comes back
SWEEP_SECONDS = 600.0
OUTCOMES = ("published", "held", "failed", "duplicate")


class Service:
    """The caller holds the home's lock and calls `start`, then `tick` again and again, then `stop`.

    Attributes:
        outcomes: the events that ended a batch since the start, for the summary of `run --once`.
        trouble: why nothing moves at the moment, in a sentence; None when all is well.
    """

    def __init__(self, home: Path, config: Config, *, view: View, launch: Launch) -> None:
        self._home, self._config, self._view = home, config, view
        self._spool = Spool(home)
        self._store = VersionStore(home / "serving")
        self._events = EventLog(home, max_bytes=config.log.events_max_bytes)
        self._status = StatusFile(home)
        self.reception = Reception(home, config, tell=self.tell)
        publisher = Publisher(home, config, self._spool, self._store, self.tell)
        self._lifecycle = Lifecycle(publisher, launch)
        self._paused_until = self._sweep_at = 0.0
        self._pause = TROUBLE_SECONDS
        self._last_trouble: str | None = None  # kept when it seems over, until something else happens
        self.outcomes: list[dict[str, Any]] = []
        self.trouble: str | None = None

    def start(self) -> None:
        """Finish or undo what a killed daemon left behind.

        Raises:
            DeployError: the version store cannot be used, `current` points nowhere for one; says what to do.
        """
        self._store.recover()
        live = self._store.current()
        self._spool.recover()
        retention.remove_leftovers(self._home)
        self._events.open()
        batches = [(state, batch) for state in STATES for batch in self._spool.batches(state)]
        manifests = [self._store.manifest(version) for version in self._store.versions()]
        for event in missing_events(self._events.read(), manifests, batches):
            self._events.append(**event)
        self._lifecycle.close_interrupted()
        self.tell("started", version=live)

    def tick(self, now: float) -> bool:
        """One iteration; says whether the next one should follow at once.

        Trouble with the disk is told once and tried again later; nothing is lost by it.
        """
        is_busy = False
        try:
            execute_pending(self._home, self._execute)
            if now >= self._paused_until:
                self.reception.tick(now)
                self._lifecycle.observe(now)
                is_busy = self._lifecycle.advance(now)
                self._sweep(now)
                self.trouble = None
        except (OSError, DaemonError, DeployError) as error:
            self._pause_for(str(error), now)
        self._show()
        return is_busy

    def _pause_for(self, why: str, now: float) -> None:
        if why == self._last_trouble:
            self._pause = min(2 * self._pause, TROUBLE_SECONDS_AT_MOST)
        else:
            self._pause = TROUBLE_SECONDS
            logs.log("trouble", level=logging.ERROR, why=why, next_try_seconds=self._pause)
        self._paused_until = now + self._pause
        self.trouble = self._last_trouble = why

    def is_idle(self) -> bool:
        """Nothing is left to do: no drop on its way in, no batch to learn (or a pin keeps them waiting)."""
        return self.reception.is_idle and self._is_worked_off()

    def why_stuck(self) -> str | None:
        """Why waiting will not help, in a sentence: trouble, or a full disk at the door and nothing else to
        do. None as long as something moves.
        """
        return self.trouble or (self.reception.waits if self._is_worked_off() else None)

    def _is_worked_off(self) -> bool:
        if self._lifecycle.working is not None:
            return False
        return self.is_pinned() or not (self._spool.ids("work") or self._spool.ids("queued"))

    def is_pinned(self) -> bool:
        """Whether an operator keeps new versions from being published."""
        return self._store.pin() is not None

    def stop(self, should_force: Callable[[], bool] = lambda: False) -> None:
        """Stop in order: the worker first (it checkpoints), then the status. Batches stay where they are."""
        self._view.clear()
        if (working := self._lifecycle.working) is not None:
            logs.log(
                "stopping", what="worker", batch=working["batch"], wait=self._config.learning.stop_seconds
            )
            self._lifecycle.interrupt("interrupted", should_force)
        self._status.remove()
        self.tell("stopped")

    def tell(self, event: str, level: int = logging.INFO, /, **fields: Any) -> None:
        """Say that something happened, to the log and to events.jsonl, after it is on disk."""
        logs.log(event, level=level, **fields)
        if event in OUTCOMES:
            self._last_trouble = None
            self.outcomes.append({"event": event, **fields})
        try:
            self._events.append(event, **fields)
        except OSError as error:
            # The files are the truth: what is missing here is told again at the next start.
            logs.log("event not recorded", level=logging.WARNING, what=event, why=str(error))

    def _execute(self, request: Request) -> Answer:
        answer = operations.apply(request, self._store, self.tell)
        self._paused_until = 0.0  # what was in the way may be out of it
        return answer

    def _sweep(self, now: float) -> None:
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_SECONDS
            retention.sweep(self._home, self._config.retention, now)

    def _show(self) -> None:
        """Progress for people, status.json for programs."""
        working = self._lifecycle.working
        if working is not None:
            self._view.update(**working)
        else:
            self._view.clear()
        try:
            pin, live = self._store.pin(), self._store.current()
        except DeployError:
            pin, live = None, None
        content = {
            "state": self._state(is_pinned=pin is not None),
            "live": live,
            "pin": pin_fields(pin),
            "queued": self._spool.ids("queued"),
            "working": working,
            "inbox": self.reception.problems,
            "trouble": self.trouble,
        }
        self._status.write(content, now_or_later=working is not None and "step" in working)

    def _state(self, *, is_pinned: bool) -> str:
        if self.trouble is not None:
            return "waiting"
        if is_pinned:
            return "pinned"
        return "idle" if self._lifecycle.working is None else "working"
