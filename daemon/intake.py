"""From the inbox to queued/: one iteration per call, the clock given, nothing lost on the way.

    scan → ready → claim → unpack → compose → batch.json → images/ → queued (or done, or failed)

Up to batch.json the work is done again after a crash; from there on it is carried out. Only intake writes in
incoming/. Knows nothing of learning; what is live it is told.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from daemon import logs
from daemon.batch import BATCH_FILE, Batch, read_batch, the_first, why_not_after_held
from daemon.claim import LATER, Claim, gather, read_claim, space_for, stake, unfinished, write_claim
from daemon.compose import Context, Known, KnownClass, compose
from daemon.config import Config
from daemon.delivery import flush, move_images
from daemon.errors import DaemonError, InboxError, NoSpaceError, Stopped
from daemon.inbox import Item, Problem, Scan, empty_folders, hidden_folders, ready_items, scan_inbox
from daemon.source import read_source
from daemon.spool import Reason, Spool
from deploy import atomic

MAX_CRASHES = 3  # one says nothing about the drop: the daemon may have been killed
_AGAIN = "correct that and drop it again; what was sent is kept with the batch"


@dataclass(frozen=True)
class IntakeEvent:
    """Something that happened, for the log: `message` is the sentence for people."""

    # batch_queued | batch_duplicate | batch_failed, then batch_set_aside and batch_note for what else there
    # is to tell of that batch; intake_waits | inbox_problem
    event: str
    message: str
    batch: str | None = None


@dataclass
class Intake:
    """The intake of one home."""

    config: Config
    inbox: Path
    spool: Spool
    known: Callable[[], Known] = Known
    should_stop: Callable[[], bool] = lambda: False  # asked between two images
    scan: Scan = field(default_factory=Scan)
    problems: tuple[Problem, ...] = ()
    waits: str | None = None  # why nothing is taken in now, such as a full disk
    _untold: list[IntakeEvent] = field(default_factory=list)
    _counted: set[str] = field(default_factory=set)  # claims whose attempt counter this process raised

    def step(self, now: float) -> list[IntakeEvent]:
        """Finish what was begun, then take in what is ready.

        Raises:
            InboxError: the inbox cannot be read; says what to do.
            DeployError: the version store cannot be read; nothing is failed for that, every claim stays.
        """
        events = self._untold  # kept where an error comes between: what happened is told at the next step
        told, self.waits = self.waits, None
        try:
            for batch in self.spool.ids("incoming"):
                events += self._try_to_finish(batch)
            self._take_ready(now, events)
        except NoSpaceError as error:
            self.waits = str(error)
        except Stopped as error:
            self.waits = told = str(error)
        if self.waits not in {None, told}:
            events.append(IntakeEvent("intake_waits", str(self.waits)))
        self._untold = []
        return events

    def _take_ready(self, now: float, events: list[IntakeEvent]) -> None:
        """One group after the other, each by a fresh look: taking one in may take long."""
        previous, self.scan = self.scan, self._look(now)
        events += self._tell(now)
        taken: set[tuple[str, str]] = set()
        while groups := [
            group
            for group in ready_items(previous, self.scan, now, self.config.inbox)
            if taken.isdisjoint((item.name, item.fingerprint) for item in group)
        ]:
            taken |= {(item.name, item.fingerprint) for item in groups[0]}
            events += self._take(groups[0])
            previous, self.scan = self.scan, self._look(now)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is half taken in or still settling: `run --once` may end."""
        arriving = any(item.kind != "empty" for item in self.scan.items)
        return not (arriving or self.waits or self.spool.ids("incoming"))

    def seconds_to_next_scan(self, now: float) -> float:
        """How long nothing can become ready unless an event says otherwise."""
        inbox = self.config.inbox
        loose = [item for item in self.scan.items if item.kind in {"folders", "empty"}]
        moments = [item.quiet_since + inbox.settle_seconds for item in self.scan.items if item not in loose]
        if loose:
            gathered = max(item.quiet_since for item in loose) + max(
                inbox.gather_seconds, inbox.settle_seconds
            )
            if gathered > now or any(item.kind == "folders" for item in loose):
                moments.append(gathered)
        if self.waits or not moments:
            return inbox.scan_seconds
        return min(max(min(moments) - now, 0.05), inbox.scan_seconds)

    def _look(self, now: float) -> Scan:
        try:
            return scan_inbox(
                self.inbox,
                now,
                previous=self.scan,
                left_behind=self.spool.left_behind(),
                unfinished=unfinished(self.spool),
            )
        except OSError as error:
            raise InboxError(
                f"the inbox {self.inbox} cannot be read ({error.strerror}); create it or correct its rights"
            ) from error

    def _tell(self, now: float) -> list[IntakeEvent]:
        """Each problem once, as long as it stays the same."""
        told = set(self.problems)
        empty = empty_folders(self.scan, now, self.config.inbox)
        hidden = hidden_folders(self.scan, now, self.config.inbox)
        self.problems = (*self.scan.problems, *empty, *hidden)
        return [IntakeEvent("inbox_problem", p.sentence) for p in self.problems if p not in told]

    def _take(self, group: list[Item]) -> list[IntakeEvent]:
        """Claim a group and finish it."""
        seq = self.spool.next_seq(self.known().batch_ids)
        received_at = datetime.now(UTC).isoformat(timespec="seconds")
        claim = stake(group, self.inbox, spool=self.spool, seq=seq, received_at=received_at)
        rest = tuple(item for item in self.scan.items if item not in group)
        self.scan = replace(self.scan, items=rest)
        return self._try_to_finish(claim.id)

    def _try_to_finish(self, batch: str) -> list[IntakeEvent]:
        """As _finish; a batch too large for the disk waits without holding up the others."""
        try:
            return self._finish(batch)
        except NoSpaceError as error:
            self.waits = str(error)
            return []

    def _finish(self, batch: str) -> list[IntakeEvent]:
        """Bring a claimed batch out of incoming/."""
        directory = self.spool.state_dir("incoming") / batch
        is_composed = (directory / BATCH_FILE).exists()
        # Out here, because a fault of the home is none of the drop: the claim stays until that is mended.
        context = Context(self.config) if is_composed else self._context(batch)
        try:
            for leftover in directory.glob(f"{atomic.TEMPORARY_PREFIX}*"):
                atomic.remove_tree(leftover)  # a copy or an unpacking that was cut short
            claim = gather(read_claim(directory), self.spool)
            with space_for(f"{batch} is kept in {directory} {LATER}"):
                if not is_composed:
                    self._compose_once(claim, directory, context)
                return self._deliver(read_batch(directory), directory)
        except (NoSpaceError, Stopped):
            raise
        except (DaemonError, OSError) as error:
            return [self._fail(batch, directory, str(error), [])]
        except Exception as error:  # noqa: BLE001 - one bad drop must not keep the others from being learnt
            logs.log("intake failed", level=logging.ERROR, exc_info=True, batch=batch)
            what = f"it could not be read ({type(error).__name__}: {error})"
            return [self._fail(batch, directory, what, [])]

    def _context(self, batch: str) -> Context:
        history = self.spool.history(without=batch)
        return Context(self.config, self._known_and_coming(), history, self.should_stop)

    def _compose_once(self, claim: Claim, directory: Path, context: Context) -> None:
        """As _compose; a drop that ends the process each time it is read is not read for ever."""
        is_counted = claim.id in self._counted
        before = claim.attempts - is_counted
        if before >= MAX_CRASHES:
            raise InboxError(
                f"the daemon ended {before} times in a row while it read this drop, "
                "which one of its files may have caused; find that file and leave it out"
            )
        if not is_counted:
            write_claim(claim.model_copy(update={"attempts": before + 1}), directory)
            self._counted.add(claim.id)
        try:
            self._compose(claim, directory, context)
        except BaseException:
            with suppress(OSError):  # a full disk: this process at least will not count it twice
                write_claim(claim.model_copy(update={"attempts": before}), directory)
                self._counted.discard(claim.id)
            raise

    def _compose(self, claim: Claim, directory: Path, context: Context) -> None:
        layouts = read_source(claim, directory, config=self.config.inbox)
        record = compose(claim, layouts, base=directory, context=context)
        record = record.model_copy(update={"duplicate_of": self._duplicate_of(record, context.known)})
        flush(directory)  # first: what the record names must be there after a power cut
        atomic.write_file(directory / BATCH_FILE, record.to_json().encode())

    def _known_and_coming(self) -> Known:
        """What is live, and the classes of batches on their way: their spelling came first."""
        known = self.known()
        coming = {
            entry.key: KnownClass(entry.name, entry.template)
            for batch in reversed(list(self.spool.batches("queued", "work")))
            for entry in batch.classes
        }
        return Known({**coming, **known.classes}, known.producer_ids, known.contents, known.batch_ids)

    def _duplicate_of(self, record: Batch, known: Known) -> str | None:
        """The batch that brought the same: by the producer's id ever, by content while it counts."""
        if record.producer_id is not None and record.producer_id in known.producer_ids:
            return known.producer_ids[record.producer_id]
        for other in self.spool.batches("work", "queued", "held", "done"):
            if other.id == record.id:
                continue
            if record.producer_id is not None and other.producer_id == record.producer_id:
                return other.duplicate_of or other.id
            is_open = self.spool.find(other.id) in {"work", "queued"}  # what was held may be tried again
            if is_open and record.images and other.content_sha256 == record.content_sha256:
                return other.duplicate_of or other.id
        return known.contents.get(record.content_sha256) if record.images else None

    def _deliver(self, record: Batch, directory: Path) -> list[IntakeEvent]:
        """Carry out batch.json: move the images, then the batch."""
        record = move_images(record, directory, min_images=self.config.inbox.min_images_per_class)
        aside = [item.sentence for item in record.set_aside]
        if not record.classes:
            causes = aside or record.warnings
            reason = causes[0] if len(causes) == 1 else "no class in it has enough usable images"
            failed = self._fail(record.id, directory, reason, [*aside, *record.warnings])
            return [failed, *self._notes(record)] if len(causes) > 1 else [failed]
        self.spool.move(record.id, "done" if record.duplicate_of else "queued")
        if record.duplicate_of:
            message = f"{record.id} brings the same as {record.duplicate_of} did and is not learnt again"
            if self.spool.find(record.duplicate_of) == "held":
                why = why_not_after_held(record.producer_id, record.duplicate_of)
                message = f"{record.id} was not learnt: {why}"
            return [IntakeEvent("batch_duplicate", message, record.id)]
        names = ", ".join(entry.name for entry in record.classes)
        message = f"{record.id} is queued: {len(record.images)} images of {names}"
        if aside:
            message += f"; {len(aside)} set aside, named in {self._record_path(record.id)}"
        return [IntakeEvent("batch_queued", message, record.id), *self._notes(record)]

    def _record_path(self, batch: str) -> Path:
        """Where to read it, for people: a shell finds it in whatever state the batch is by then."""
        return self.spool.root / "*" / batch / BATCH_FILE

    def _notes(self, record: Batch) -> list[IntakeEvent]:
        """What was set aside and what else the sender should know, one event each."""
        found = {
            "batch_set_aside": [item.sentence for item in record.set_aside],
            "batch_note": record.warnings,
        }
        return [
            IntakeEvent(event, sentence, record.id)
            for event, sentences in found.items()
            for sentence in the_first(sentences, self._record_path(record.id))
        ]

    def _fail(self, batch: str, directory: Path, reason: str, details: list[str]) -> IntakeEvent:
        with space_for(f"{batch} is kept in {directory} {LATER}"):
            path = self.spool.fail(
                Reason(
                    batch=batch,
                    reason=reason.encode("utf-8", "backslashreplace").decode(),
                    what_to_do=_AGAIN,
                    failed_at=datetime.now(UTC).isoformat(timespec="seconds"),
                    details=details,
                )
            )
        return IntakeEvent("batch_failed", f"{batch} was not taken in: {reason}. It is kept in {path}", batch)
