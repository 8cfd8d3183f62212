"""From the inbox to queued/: one iteration per call, the clock given, nothing lost on the way.

    scan → ready → claim → taken in (taking.py): here if small, else in a process of its own (lane.py)

One call does no more than a part of a second's work, however much lies in the inbox. Only intake writes in
incoming/. Knows nothing of learning; what is live it is told.
"""

import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from daemon.claim import read_claim, stake, unfinished
from daemon.compose import Known
from daemon.config import Config
from daemon.errors import InboxError, NoSpaceError, Stopped
from daemon.inbox import (
    CLAIMED_PREFIX,
    Item,
    Problem,
    Scan,
    empty_folders,
    hidden_folders,
    ready_items,
    scanning,
)
from daemon.lane import Lane
from daemon.ledger import Ledger
from daemon.spool import Spool
from daemon.survey import is_larger, survey
from daemon.taking import IntakeEvent, Taker

LARGE_ENTRIES = 256  # files and folders; and bytes: what takes no more than a second or two to read and flush
LARGE_BYTES = 16 << 20
HERE_SECONDS = 5.0  # what takes longer to read than that, small as it is, goes on in a process of its own


@dataclass
class Intake:
    """The intake of one home.

    Attributes:
        should_stop: asked between two images.
        lane: where large drops are taken in; None: here, like all others.
        round_seconds: about how long one step may take.
        waits: why nothing is taken in now, such as a full disk.
    """

    config: Config
    inbox: Path
    spool: Spool
    known: Callable[[], Known] = Known
    should_stop: Callable[[], bool] = lambda: False
    lane: Lane | None = None
    round_seconds: float = float("inf")
    scan: Scan = field(default_factory=Scan)
    problems: tuple[Problem, ...] = ()
    waits: str | None = None
    ledger: Ledger = field(init=False)
    _untold: list[IntakeEvent] = field(default_factory=list)
    _counted: set[str] = field(default_factory=set)
    _large: dict[str, bool] = field(default_factory=dict)  # of claims that were looked at
    _scanning: Generator[None, None, Scan] | None = None
    _groups: deque[list[Item]] = field(default_factory=deque)  # ready by the last scan, and not taken yet
    _is_fresh: bool = False  # nothing was taken in since that scan
    _claimed: set[str] = field(default_factory=set)  # names, since the last scan was brought up to date
    _taken: set[tuple[str, str]] = field(default_factory=set)  # name and fingerprint, since nothing was ready

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.spool)

    def step(self, now: float, *, is_due: bool = True) -> list[IntakeEvent]:
        """Finish what was begun, then take in what is ready; call again at once while `is_busy`.

        Args:
            is_due: look at the inbox again, if that is not under way; and try again what had to wait.

        Raises:
            InboxError: the inbox cannot be read; says what to do.
            DeployError: the version store cannot be read; nothing is failed for that, every claim stays.
        """
        events = self._untold  # kept where an error comes between: what happened is told at the next step
        told, self.waits = self.waits, None
        until = time.monotonic() + self.round_seconds
        try:
            self._go_on(now, events, is_due=is_due)
            is_deciding = self.lane is not None and self.lane.is_deciding
            if (is_due or self.is_busy) and not is_deciding:
                self._take_ready(now, until, events)
        except (NoSpaceError, Stopped) as error:
            self.waits = str(error)
            told = self.waits if isinstance(error, Stopped) else told
            self._groups.clear()  # to be found again by the next look
            self._taken.clear()
        if self.waits not in {None, told}:
            events.append(IntakeEvent("intake_waits", str(self.waits)))
        self._untold = []
        return events

    @property
    def is_busy(self) -> bool:
        """Whether there is more to do at once."""
        return self._scanning is not None or bool(self._groups or self._taken)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is half taken in or still settling: `run --once` may end."""
        arriving = any(item.kind != "empty" for item in self.scan.items)
        return not (arriving or self.is_busy or self.waits or self.spool.ids("incoming"))

    def stop(self, should_force: Callable[[], bool] = lambda: False) -> None:
        """End the process that takes in a large drop, if there is one; the drop is read again later."""
        if self.lane is not None:
            self.lane.stop(should_force)

    def seconds_to_next_scan(self, now: float) -> float:
        """How long nothing can become ready unless an event says otherwise."""
        inbox = self.config.inbox
        loose = [item for item in self.scan.items if item.kind in {"folders", "empty"}]
        moments = [
            item.quiet_since + inbox.settle_seconds
            for item in self.scan.items
            if item.kind not in {"folders", "empty"}
        ]
        if loose:
            gathered = max(item.quiet_since for item in loose) + max(
                inbox.gather_seconds, inbox.settle_seconds
            )
            if gathered > now or any(item.kind == "folders" for item in loose):
                moments.append(gathered)
        if self.waits or not moments:
            return inbox.scan_seconds
        return min(max(min(moments) - now, 0.05), inbox.scan_seconds)

    def _go_on(self, now: float, events: list[IntakeEvent], *, is_due: bool) -> None:
        """With what is claimed already: a large drop at a time in the lane, the small ones here."""
        lane = self.lane
        if lane is not None:
            events += lane.observe(now)
            self.waits = lane.waits
            if lane.is_deciding:
                return
        claimed = self.spool.ids("incoming")
        self._large = {batch: self._large[batch] for batch in claimed if batch in self._large}
        for batch in claimed:
            if lane is not None and self._is_large(batch):
                if lane.is_free(now):
                    lane.start(batch, now)
            elif is_due:
                events += self._try_to_finish(batch)

    def _take_ready(self, now: float, until: float, events: list[IntakeEvent]) -> None:
        """One group after the other, until there is none or the time is over."""
        try:
            while self._find_ready(now, until, events):
                group = self._groups.popleft()
                if not self._is_unchanged(group):
                    continue
                self._is_fresh = False
                events += self._take(group, now)
                # After it: what a broken disk keeps from being claimed is tried, and told, again.
                self._taken |= {(item.name, item.fingerprint) for item in group}
                if time.monotonic() >= until:
                    break
        finally:
            if self._claimed:
                rest = tuple(item for item in self.scan.items if item.name not in self._claimed)
                self.scan = replace(self.scan, items=rest)
                self._claimed.clear()

    def _find_ready(self, now: float, until: float, events: list[IntakeEvent]) -> bool:
        """See that the next group is at the head; says whether there is one now."""
        if self._groups and not self._is_fresh and _must_be_fresh(self._groups[0]):
            self._groups.clear()
        if self._groups:
            return True
        found = self._look(now, until)
        if found is None:
            return False
        previous, self.scan = self.scan, found
        if not self._taken:
            events += self._tell(now)
        self._is_fresh = True
        self._groups.extend(
            group
            for group in ready_items(previous, self.scan, now, self.config.inbox)
            if self._taken.isdisjoint((item.name, item.fingerprint) for item in group)
        )
        if not self._groups:
            self._taken.clear()
        return bool(self._groups)

    def _is_unchanged(self, group: list[Item]) -> bool:
        """Whether it is still what the scan saw: taking in the groups before it may have taken long."""
        if self._is_fresh:
            return True
        try:
            return all(survey(self.inbox / item.name).fingerprint == item.fingerprint for item in group)
        except (OSError, InboxError):
            return False

    def _look(self, now: float, until: float) -> Scan | None:
        """The inbox as it is now; None where the time did not suffice, and the next call goes on."""
        try:
            if self._scanning is None:
                # In this order: what was taken out of sight by the first is in the second.
                half_taken = unfinished(self.spool)
                left = self.spool.left_behind()
                self._scanning = scanning(
                    self.inbox, now, previous=self.scan, left_behind=left, unfinished=half_taken
                )
            next(self._scanning)
            while time.monotonic() < until:
                next(self._scanning)
        except StopIteration as ended:
            self._scanning = None
            found: Scan = ended.value
            return found
        except OSError as error:
            self._scanning = None
            raise InboxError(
                f"the inbox {self.inbox} cannot be read ({error.strerror}); create it or correct its rights"
            ) from error
        return None

    def _tell(self, now: float) -> list[IntakeEvent]:
        """Each problem once, as long as it stays the same."""
        told = set(self.problems)
        empty = empty_folders(self.scan, now, self.config.inbox)
        hidden = hidden_folders(self.scan, now, self.config.inbox)
        self.problems = (*self.scan.problems, *empty, *hidden)
        news = [problem for problem in self.problems if problem not in told]
        return [IntakeEvent("inbox_problem", p.sentence, path=self.inbox / p.name) for p in news]

    def _take(self, group: list[Item], now: float) -> list[IntakeEvent]:
        """Claim a group, and finish it or have it finished."""
        known = self.known()
        self.ledger.look()
        seq = self.ledger.next_seq(known.highest_seq)
        received_at = datetime.now(UTC).isoformat(timespec="seconds")
        claim = stake(group, self.inbox, spool=self.spool, seq=seq, received_at=received_at)
        self._claimed |= {item.name for item in group}  # not before: else it would not be ready next time
        if self.lane is None or not self._is_large(claim.id):
            return self._try_to_finish(claim.id)
        if self.lane.is_free(now):
            self.lane.start(claim.id, now)
        return []

    def _is_large(self, batch: str) -> bool:
        """Whether a claimed drop takes too long to be taken in between two rounds of the daemon's loop."""
        if batch not in self._large:
            directory = self.spool.state_dir("incoming") / batch
            places = [directory]
            try:
                claim = read_claim(directory)
            except InboxError:
                return False  # which is told at once
            places += [Path(claim.inbox) / name for name in claim.items]
            places += Path(claim.inbox).glob(f"{CLAIMED_PREFIX}{claim.id}*")
            self._large[batch] = is_larger(places, entries=LARGE_ENTRIES, size_bytes=LARGE_BYTES)
        return self._large[batch]

    def _try_to_finish(self, batch: str) -> list[IntakeEvent]:
        """Take a small drop in; one too large for the disk waits without holding up the others."""
        late_at = time.monotonic() + (float("inf") if self.lane is None else HERE_SECONDS)

        def should_stop() -> bool:
            return time.monotonic() > late_at or self.should_stop()

        taker = Taker(
            self.config,
            self.spool,
            self.ledger,
            known=self.known,
            should_stop=should_stop,
            counted=self._counted,
        )
        try:
            return taker.finish(batch)
        except NoSpaceError as error:
            self.waits = str(error)
            return []
        except Stopped:
            if time.monotonic() <= late_at:
                raise
            self._large[batch] = True
            return []


def _must_be_fresh(group: list[Item]) -> bool:
    """Whether a group is only taken right after a scan: class folders are gathered once all are quiet, and it
    takes a scan to see whether a large folder has changed.
    """
    is_gathered = any(item.mark is None and item.kind == "folders" for item in group)
    return is_gathered or sum(item.entries for item in group) > LARGE_ENTRIES
