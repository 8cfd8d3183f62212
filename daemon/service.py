"""The daemon of one home, one iteration per call: requests, inbox, worker, gate. The clock comes from
outside.

Knows the order of things; each of them lives in a module of its own.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from daemon import attempts, logs, operations, retention
from daemon.budget import needed_bytes
from daemon.config import Config, keys_of
from daemon.events import EventLog
from daemon.exams import exam_dir
from daemon.forget import finish_forgetting
from daemon.lane import Lane
from daemon.lifecycle import Launch, Lifecycle
from daemon.observers import Observers
from daemon.part import TROUBLE_SECONDS, Part
from daemon.progress import View
from daemon.publish import Publisher
from daemon.reception import Reception
from daemon.recovery import Published, missing_events
from daemon.requests import Answer, Request, execute_pending
from daemon.rest import Resting
from daemon.revision import LONG_COMMANDS, Reviser
from daemon.sharing import Sharing, signer
from daemon.spool import Spool
from daemon.status import StatusFile, describe, is_full_disk, pin_fields
from daemon.waits import Waits
from deploy.errors import DeployError
from deploy.store import VersionStore
from deploy.store_reader import Pin

SWEEP_SECONDS = 600.0
# The watcher sits on that folder; keys and targets of sharing are opened once.
AFTER_RESTART = ("inbox.path", "learning.standby", "signing.", "mirror.", "triton.", "metrics.", "log.format")
OUTCOMES = ("published", "held", "failed", "duplicate")


class Service:
    """The caller holds the home's lock and calls `start`, then `tick` again and again, then `stop`.

    Attributes:
        outcomes: the events that ended a batch since the start, for the summary of `run --once`.
    """

    def __init__(self, home: Path, config: Config, *, view: View, launch: Launch) -> None:
        self._home, self._config, self._view = home, config, view
        self._spool = Spool(home)
        self._store = VersionStore(home / "serving", sign=signer(config))
        self._events = EventLog(home, max_bytes=config.log.events_max_bytes)
        self._status = StatusFile(home)
        lane = Lane(home, config_path=launch.config_path, wake=launch.wake)
        self.reception = Reception(home, config, tell=self.tell, lane=lane)
        self._publisher = Publisher(home, config, self._spool, self._store, self.tell)
        self._lifecycle = Lifecycle(self._publisher, launch)
        self._reviser = Reviser(
            self._publisher, launch, pause_learning=self._pause_learning, standby=self._lifecycle.standby
        )
        self._sharing = Sharing(home / "serving", config, self.tell)
        self._observers, self._waits = Observers(home, config, self.tell), Waits(self._spool)
        self._resting = Resting(home, self._store)
        self._requests, self._inbox, self._cleaning = (Part(self._explain) for _ in range(3))
        self._learning, self._spreading = Part(self._explain, self._about_learning), Part(self._explain)
        self._showing = Part(self._explain, at_most_seconds=TROUBLE_SECONDS)
        self._parts = (
            *(self._learning, self._inbox, self._requests, self._cleaning, self._spreading, self._showing),
        )
        self._answers: dict[str, Answer] = {}  # of requests that were executed on a disk too full to say so
        self._is_recovered = False
        self._sweep_at = 0.0
        self._live: int | None = None
        self.outcomes: list[dict[str, Any]] = []

    def start(self) -> None:
        """Finish or undo what a killed daemon left behind. Where the disk is full, `tick` tries again.

        Raises:
            DeployError: the version store cannot be used, `current` points nowhere for one; says what to do.
        """
        try:
            self._recover()
        except OSError as error:
            self._learning.rest(error, now=0.0)

    def _recover(self) -> None:
        self._store.recover(keep=self._publisher.whole_candidates())
        live = self._store.current()
        self._spool.recover()
        retention.remove_leftovers(self._home)
        versions, batches = Published(self._store), self._spool.listed()
        for event in missing_events(self._events.each(), versions, batches):
            if not retention.is_worth_telling(event["at"], self._config.retention, time.time()):
                continue
            self._observers.missed(event)
            if not self._events.record(**event):
                break
        self._publisher.finish_promoted()
        finish_forgetting(self._home, self._config.inbox_dir(self._home))
        self._lifecycle.close_interrupted()
        self._is_recovered = True
        self.tell("started", version=live)

    def tick(self, now: float, *, steady: float | None = None) -> bool:
        """One iteration; says whether the next one should follow at once.

        Each part has its own trouble: an inbox that cannot be read stops no worker and no publication.

        Args:
            now: the time of day, in seconds since the epoch.
            steady: a clock that nobody sets, in seconds; by default the same. It tells how long a drop has
                been quiet: after a suspend the time of day would say that of one that is still copied.
        """
        self._requests.attempt(self._execute_pending, now)
        if not self._is_recovered:
            self._learning.attempt(self._recover, now)
            self._showing.attempt(lambda: self._show(now), now)
            return self._is_recovered
        has_drops = self._inbox.attempt(lambda: self.reception.tick(now if steady is None else steady), now)
        is_busy = self._learning.attempt(lambda: self._learn(now), now) or has_drops
        self._cleaning.attempt(lambda: self._sweep(now), now)
        self._spreading.attempt(self._sharing.tick, now)
        self._showing.attempt(lambda: self._show(now), now)
        return is_busy

    def _execute_pending(self) -> None:
        is_under_way = self._reviser.is_under_way
        execute_pending(self._home, self._execute, self._answers, is_under_way=is_under_way)
        self._reviser.observe()

    def _learn(self, now: float) -> bool:
        self._lifecycle.observe(now)
        if self._reviser.is_changing_live or self._must_rest(now):
            return False
        is_busy = self._lifecycle.advance(now)
        if not is_busy:
            self._lifecycle.stand_by(now)
        return is_busy

    def _must_rest(self, now: float) -> bool:
        """Whether batches queue now; one that is being learnt stops at a checkpoint where that is meant."""
        rest = self._resting.look(self._config.schedule, now)
        if rest is not None and rest.interrupts:
            self._pause_learning(rest.why)
            self._lifecycle.standby.stop()
        return rest is not None and self._lifecycle.working is None

    def _pause_learning(self, why: str) -> None:
        """The live version is about to change: a batch at work stops at a checkpoint."""
        self._lifecycle.interrupt(f"{attempts.RESTARTED}{why}")

    def _explain(self, error: Exception) -> str:
        """A sentence for people; the system's own about a full disk names no file and nothing to do."""
        if not isinstance(error, OSError):
            return str(error)
        what, waiting = describe(error, self._home), self._at_work()
        if waiting is None or not is_full_disk(error):
            return what
        return f"{what}; meanwhile {waiting} waits in {self._spool.state_dir('work')}"

    def _about_learning(self) -> dict[str, Any]:
        return {"batch": self._at_work()}

    def _at_work(self) -> str | None:
        """The batch in work/; None where there is none, or where that cannot be read just now."""
        with contextlib.suppress(OSError):
            return next(iter(self._spool.ids("work")), None)
        return None

    @property
    def trouble(self) -> str | None:
        """What does not go on at the moment and why, in a sentence per part; None when all is well."""
        return "; ".join(dict.fromkeys(part.trouble for part in self._parts if part.trouble)) or None

    def reconfigure(self, config: Config) -> None:
        """Take over a changed configuration, and say what holds from now on and what only after a restart.

        A batch at work keeps the plan it began with; the next one is learnt by the new settings.
        """
        before = dict(keys_of(self._config))
        changed = [key for key, value in keys_of(config) if value != before[key]]
        late = [key for key in changed if key.startswith(AFTER_RESTART)]
        inbox = config.inbox.model_copy(update={"path": self._config.inbox.path})
        self._config = config = config.model_copy(update={"inbox": inbox})
        self.reception.reconfigure(config)
        self._publisher.config = config
        self._observers.reconfigure(config)
        self._events.max_bytes = config.log.events_max_bytes
        logs.set_level(config.log.level)
        self.tell("reloaded", changed=[key for key in changed if key not in late], after_restart=late)

    @property
    def stop_seconds(self) -> float:
        """How long a worker may take to stop."""
        return self._config.learning.stop_seconds

    @property
    def summary(self) -> str:
        """What is going on, in a line for `systemctl status`."""
        live = f"serving version {self._live}" if self._live is not None else "no version is live"
        try:
            doing = self._doing()
        except OSError as error:
            doing = f"waiting: {self._explain(error)}"
        return "; ".join(filter(None, (doing, self._taking_in(), live)))

    def _taking_in(self) -> str | None:
        drop = self.reception.taking_in
        if drop is None:
            return None
        far = f" {drop['step']}/{drop['steps']}" if drop.get("steps") else ""
        return f"taking in {drop['batch']}: {drop['phase']}{far}"

    def _doing(self) -> str:
        if self.trouble:
            return f"waiting: {self.trouble}"
        if (revising := self._reviser.working) is not None:
            what = revising.get("batch") or f"version {revising.get('version')}"
            return f"{revising['command']} {what}: {revising.get('phase', 'start')}"
        working = self._lifecycle.working
        if working is None:
            queued = len(self._spool.ids("queued"))
            if self.why_rest:
                return f"{queued} batches queued; {self.why_rest}"
            return f"{queued} batches queued" if queued else "idle"
        if "step" not in working:
            return f"batch {working['batch']}: {working.get('phase', 'start')}"
        left = f", ETA {working['eta_seconds']:.0f} s" if working.get("eta_seconds") is not None else ""
        return f"batch {working['batch']}: step {working['step']}/{working['steps']}{left}"

    def is_idle(self) -> bool:
        """Nothing is left to do: no drop on its way in, no batch to learn (or a pin keeps them waiting)."""
        is_told = self._sharing.is_done() and self._observers.is_idle()
        return is_told and self.reception.is_idle and self._is_worked_off()

    def why_stuck(self) -> str | None:
        """Why waiting will not help, in a sentence: trouble with learning, or trouble at the door and nothing
        else to do. None as long as something moves.
        """
        at_the_door = self._inbox.trouble or self.reception.waits or self._spreading.trouble
        return self._learning.trouble or (at_the_door if self._is_worked_off() else None)

    def _is_worked_off(self) -> bool:
        if self._lifecycle.working is not None or self._reviser.working is not None:
            return False
        waits = self.is_pinned() or self._resting.rest is not None
        return waits or not (self._spool.ids("work") or self._spool.ids("queued"))

    @property
    def why_rest(self) -> str | None:
        """Why batches queue although nothing is wrong: paused, or not the time; None otherwise."""
        return self._resting.rest.why if self._resting.rest else None

    def is_pinned(self) -> bool:
        """Whether an operator keeps new versions from being published."""
        return self._store.pin() is not None

    def stop(self, should_force: Callable[[], bool] = lambda: False) -> None:
        """Stop in order: the worker first (it checkpoints), then the status. Batches stay where they are."""
        self._view.clear()
        self._reviser.stop()
        self._lifecycle.standby.stop()
        self.reception.stop(should_force)
        if (working := self._lifecycle.working) is not None:
            logs.log(
                "stopping", what="worker", batch=working["batch"], wait=self._config.learning.stop_seconds
            )
            try:
                self._lifecycle.interrupt("interrupted", should_force)
            except OSError as error:  # the worker has ended; the next start marks its attempt
                logs.log("attempt not marked", level=logging.WARNING, why=self._explain(error))
        self._status.remove()
        self._observers.stop()
        self.tell("stopped")
        logs.stand(live=None)

    def tell(self, event: str, level: int = logging.INFO, /, **fields: Any) -> None:
        """Say that something happened, to the log and to events.jsonl, after it is on disk."""
        self._look_at_store()
        logs.log(event, level=level, **fields)
        if event in OUTCOMES:
            self._learning.forget()
            self.outcomes.append({"event": event, **fields})
        self._events.record(event, **fields)
        self._observers.told(event, fields)

    def _execute(self, request: Request) -> Answer | None:
        if not self._is_recovered and request.command not in ("rollback", "unpin"):
            return Answer(exit_code=1, error=f"the daemon cannot start yet: {self.trouble}; try again later")
        if request.command in LONG_COMMANDS:
            answer = self._reviser.answer(request)
        else:
            answer = self._make_way(request) or operations.apply(request, self._publisher)
        if answer is not None:
            for part in self._parts:
                part.wake()
        return answer

    def _make_way(self, request: Request) -> Answer | None:
        """Before images are forgotten, whoever may be reading them stops; an answer where that cannot be."""
        if request.command not in ("forget", "retry", "discard"):
            return None
        busy, working = self._reviser.working, self._lifecycle.working
        is_exam = request.command == "forget" and exam_dir(self._home, request.batch or "").is_dir()
        is_graded = is_exam and self._reviser.is_changing_live  # a rebuild reads versions, and no exam
        if busy is not None and (busy.get("batch") == request.batch or is_graded):
            under_way = f"`{busy['command']} {busy.get('batch') or busy.get('version')}`"
            why = f"{under_way} is under way: {request.command} {request.batch} when that has ended"
            return Answer(exit_code=1, error=why)
        if request.command == "retry":
            self._lifecycle.wait_no_longer(request.batch or "")
            self.reception.wake.set()
        if request.command != "forget":
            return None
        if working is not None and working["batch"] == request.batch:
            self._lifecycle.interrupt("its images were forgotten", should_force=lambda: True)
        elif working is not None and is_exam:
            self._pause_learning(f"the exam of {request.batch} was forgotten")
        return None

    def _sweep(self, now: float) -> None:
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_SECONDS
            config = self._config.retention
            retention.sweep(self._home, config, now)
            for name in retention.drop_old_events(self._home, config, now):
                self.tell("events_dropped", file=name, kept_days=config.event_days)
            if self._lifecycle.working is None and self._reviser.working is None:  # nobody grades on them
                for batch_id in retention.drop_old_exams(self._home, config, now):
                    self.tell("exam_dropped", batch=batch_id, kept_days=config.exam_days)

    def _show(self, now: float) -> None:
        """Progress for people, status.json for programs."""
        working, revising = self._lifecycle.working, self._reviser.working
        taking_in = self.reception.taking_in
        if revising is not None:
            self._view.update(**{key: value for key, value in revising.items() if key != "request"})
        elif working is not None:
            self._view.update(**working)
        else:
            self._view.clear()
        pin, live = self._look_at_store()
        content = {
            "state": self._state(is_pinned=pin is not None),
            "live": live,
            "pin": pin_fields(pin),
            "queued": self._spool.ids("queued"),
            "working": working,
            "revising": self._reviser.working,
            "inbox": self.reception.problems,
            "trouble": self.trouble,
            "rests": self._resting.rest.to_dict() if self._resting.rest else None,
            "oldest_at": self._waits.oldest_at(self.reception.arriving),
            "disk_needed_bytes": self._needed_bytes(live),
            "taking_in": taking_in,
            "mlflow": self._observers.tracking_trouble,
        }
        self._observers.show(content, now)
        is_moving = any("step" in (at_hand or {}) for at_hand in (working, taking_in))
        self._status.write(content, now_or_later=is_moving)

    def _needed_bytes(self, live: int | None) -> int | None:
        """What must be free for a batch to be learnt; None where nobody knows, for lack of a live version."""
        try:
            return None if live is None else needed_bytes(self._store.manifest(live), self._config.disk)
        except DeployError:
            return None

    def _look_at_store(self) -> tuple[Pin | None, int | None]:
        try:
            pin, self._live = self._store.pin(), self._store.current()
        except (OSError, DeployError):
            pin, self._live = None, None
        logs.stand(live=self._live)
        return pin, self._live

    def _state(self, *, is_pinned: bool) -> str:
        if self._learning.trouble or (self.trouble and self._lifecycle.working is None):
            return "waiting"
        if is_pinned:
            return "pinned"
        if self._lifecycle.working is not None or self._reviser.working is not None:
            return "working"
        if self._resting.rest is not None:
            return "paused" if self._resting.rest.reason == "paused" else "resting"
        return "idle"
