"""Between the service and the intake: when to look at the inbox, what to tell, what is known already."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from daemon.compose import Known, KnownClass
from daemon.config import Config
from daemon.inbox import Item
from daemon.intake import Intake
from daemon.lane import Lane
from daemon.spool import Spool
from daemon.taking import IntakeEvent
from deploy.manifest import load_classes
from deploy.store import VersionStore

ROUND_SECONDS = 0.25  # of the inbox in each round of the daemon's loop, or one small drop
# Names of events.jsonl, and how loud they are in the log.
_EVENTS = {
    "batch_queued": ("queued", logging.INFO),
    "batch_duplicate": ("duplicate", logging.INFO),
    "batch_failed": ("failed", logging.ERROR),
    "batch_set_aside": ("set_aside", logging.WARNING),
    "batch_note": ("note", logging.INFO),
    "intake_waits": ("intake_waits", logging.WARNING),
    "inbox_problem": ("inbox_problem", logging.WARNING),
}


class Reception:
    """Lets the intake look when something may have become ready: at its own times, or when a watcher woke us.

    Args:
        tell: called with an event's name, a log level, and fields.
        lane: where large drops are taken in.
        should_stop: asked between two images of a drop.
    """

    def __init__(
        self, home: Path, config: Config, *, tell: Callable[..., None], lane: Lane | None = None
    ) -> None:
        spool, store = Spool(home), VersionStore(home / "serving")
        self._tell = tell
        self._next_scan = self._scanned_at = 0.0
        self.wake = threading.Event()
        self.should_stop: Callable[[], bool] = lambda: False
        self._intake = Intake(
            config,
            config.inbox_dir(home),
            spool,
            known=Knowledge(store),
            should_stop=self._is_stopping,
            lane=lane,
            round_seconds=ROUND_SECONDS,
        )

    def reconfigure(self, config: Config) -> None:
        """Judge drops by these settings from now on; the inbox itself stays where it is."""
        self._intake.config = config
        self.wake.set()

    def _pass_on(self, event: IntakeEvent) -> None:
        name, level = _EVENTS[event.event]
        if name == "duplicate":
            spool = self._intake.spool
            twin = spool.load(event.batch or "").duplicate_of
            if twin is not None and spool.find(twin) == "held":
                why = {"is_held": True, "why": event.message}
                self._tell(name, logging.WARNING, batch=event.batch, duplicate_of=twin, **why)
            else:
                self._tell(name, level, batch=event.batch, duplicate_of=twin)
        elif name in {"queued", "set_aside", "note"}:
            self._tell(name, level, batch=event.batch, what=event.message)
        else:
            self._tell(name, level, batch=event.batch, why=event.message, path=_as_text(event.path))

    def _is_stopping(self) -> bool:
        return self.should_stop()

    def tick(self, now: float) -> bool:
        """Look at the inbox if it is time to, and take in what is ready; says whether to come back at once.

        Raises:
            InboxError: the inbox cannot be read; says what to do.
        """
        was_set_back = now < self._scanned_at
        is_due = now >= self._next_scan or self.wake.is_set() or was_set_back
        was_busy = self._intake.is_busy
        if not (is_due or was_busy or self.taking_in is not None):
            return False
        if is_due:
            self._scanned_at = now
            self.wake.clear()
        for event in self._intake.step(now, is_due=is_due):
            self._pass_on(event)
        if is_due or was_busy:
            self._next_scan = now + self._intake.seconds_to_next_scan(now)
        return self._intake.is_busy

    def stop(self, should_force: Callable[[], bool] = lambda: False) -> None:
        """End what takes in a large drop; it is read again at the next start."""
        self._intake.stop(should_force)

    @property
    def taking_in(self) -> dict[str, Any] | None:
        """The large drop that is being taken in, with `phase`, `step`, `steps`; None while there is none."""
        lane = self._intake.lane
        return None if lane is None else lane.progress

    @property
    def is_idle(self) -> bool:
        """Whether the inbox has been looked at and nothing in it is on its way in."""
        return self._next_scan > 0 and not self.wake.is_set() and self._intake.is_idle

    @property
    def arriving(self) -> tuple[Item, ...]:
        """What lies in the inbox on its way in."""
        return self._intake.scan.items

    @property
    def waits(self) -> str | None:
        """Why nothing is taken in now, a full disk for one; None when all is well."""
        return self._intake.waits

    @property
    def problems(self) -> list[str]:
        """A sentence for everything that is left lying in the inbox, and for why nothing is taken in."""
        found = [problem.sentence for problem in self._intake.problems]
        return [*found, self._intake.waits] if self._intake.waits else found


def _as_text(path: Path | None) -> str | None:
    """Absolute; None of a name that is no UTF-8, which no event can hold."""
    try:
        return None if path is None else path.absolute().as_posix().encode().decode()
    except UnicodeEncodeError:
        return None


class Knowledge:
    """What `known` says of a store, looked up anew where a version came or another is live."""

    def __init__(self, store: VersionStore) -> None:
        self._store = store
        self._key: tuple[int, int, int] | None = None
        self._known = Known()

    def __call__(self) -> Known:
        """What the published versions say now."""
        versions = self._store.versions()
        key = (self._store.current(), versions[-1], len(versions)) if versions else None
        if key != self._key:
            self._key, self._known = None, known(self._store)
            self._key = key
        return self._known


def known(store: VersionStore) -> Known:
    """What the published versions say about classes and batches.

    Producer ids count over all manifests, for a delivery is the same delivery for ever. Contents count over
    the live lineage only: what an operator rolled back may be dropped again.
    """
    if not store.versions():
        return Known()
    published = store.published_batches()
    lineage = {entry.batch for entry in store.live_manifest().lineage}
    classes = load_classes(store.path(store.current())).classes
    return Known(
        classes={entry.key: KnownClass(entry.name, entry.template) for entry in classes},
        producer_ids={p.producer_id: batch for batch, p in published.items() if p.producer_id is not None},
        contents={p.content_sha256: batch for batch, p in published.items() if batch in lineage},
        batch_ids=tuple(published),
    )
