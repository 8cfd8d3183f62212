"""One claimed drop, from incoming/ to queued/, done/ or failed/.

    gather → unpack → examine → compose → batch.json → images/ → one rename

Up to batch.json the work is done again after a crash; from there on it is carried out. The same code takes a
small drop in within the daemon's loop and a large one in a process of its own (intake_process.py). Knows
nothing of the inbox as a whole, nor of learning; what is live it is told.
"""

import logging
from collections import ChainMap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from daemon import logs
from daemon.batch import BATCH_FILE, Batch, read_batch, the_first, why_not_after_held
from daemon.claim import LATER, Claim, gather, read_claim, space_for, write_claim
from daemon.compose import Context, Known, compose, examine_all
from daemon.config import Config
from daemon.delivery import flush, move_images
from daemon.errors import BatchError, DaemonError, InboxError, NoSpaceError, Stopped
from daemon.ledger import Ledger
from daemon.source import read_source
from daemon.spool import Reason, Spool
from deploy import atomic
from deploy.errors import DeployError

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
    path: Path | None = None  # of what is left lying in the inbox


@dataclass
class Taker:
    """What drops are taken in with.

    Attributes:
        should_stop: asked between two files.
        before_deciding: called once all files were read. From then until the phase `move` nobody else may
            decide about a drop: what one brings decides how the next one is split.
        told: called with the phase, and how many of how many files are done: gather, unpack, examine, flush,
            decide, move.
        counted: claims whose attempt counter this process raised.
    """

    config: Config
    spool: Spool
    ledger: Ledger
    known: Callable[[], Known] = Known
    should_stop: Callable[[], bool] = lambda: False
    before_deciding: Callable[[], None] = lambda: None
    told: Callable[[str, int, int], None] = lambda _, __, ___: None
    counted: set[str] = field(default_factory=set)

    def finish(self, batch: str) -> list[IntakeEvent]:
        """Bring a claimed batch out of incoming/.

        Raises:
            NoSpaceError: the disk is full; everything is kept, and this may be called again.
            Stopped: `should_stop` said so; likewise.
            DeployError: the version store cannot be read, which is no fault of the drop; likewise.
        """
        directory = self.spool.state_dir("incoming") / batch
        try:
            for leftover in directory.glob(f"{atomic.TEMPORARY_PREFIX}*"):
                atomic.remove_tree(leftover)  # a copy or an unpacking that was cut short
            claim = gather(read_claim(directory), self.spool)
            with space_for(f"{batch} is kept in {directory} {LATER}"):
                if not (directory / BATCH_FILE).exists():
                    self._compose_once(claim, directory)
                return self._deliver(read_batch(directory), directory)
        except (NoSpaceError, Stopped, DeployError):
            raise
        except (DaemonError, OSError) as error:
            return [self._fail(batch, directory, str(error), [])]
        except Exception as error:  # noqa: BLE001 - one bad drop must not keep the others from being learnt
            logs.log("intake failed", level=logging.ERROR, exc_info=True, batch=batch)
            what = f"it could not be read ({type(error).__name__}: {error})"
            return [self._fail(batch, directory, what, [])]

    def _context(self, batch: str) -> Context:
        """What counts now: what is live, the classes of batches on their way, all images there ever were."""
        known = self.known()
        history = self.ledger.history(without=batch)
        classes = ChainMap(dict(known.classes), self.ledger.coming)  # type: ignore[arg-type]  # only read
        everything = Known(classes, known.producer_ids, known.contents, known.batch_ids)
        return Context(self.config, everything, history)

    def _compose_once(self, claim: Claim, directory: Path) -> None:
        """As _compose; a drop that ends the process each time it is read is not read for ever."""
        is_counted = claim.id in self.counted
        before = claim.attempts - is_counted
        if before >= MAX_CRASHES:
            raise InboxError(
                f"the process that read this drop ended {before} times in a row, "
                "which one of its files may have caused; find that file and leave it out"
            )
        if not is_counted:
            write_claim(claim.model_copy(update={"attempts": before + 1}), directory)
            self.counted.add(claim.id)
        try:
            self._compose(claim, directory)
        except BaseException:
            with suppress(OSError):  # a full disk: this process at least will not count it twice
                write_claim(claim.model_copy(update={"attempts": before}), directory)
                self.counted.discard(claim.id)
            raise

    def _compose(self, claim: Claim, directory: Path) -> None:
        self.told("unpack", 0, 0)
        layouts = read_source(claim, directory, config=self.config.inbox)
        found = examine_all(
            layouts,
            self.config.inbox,
            should_stop=self.should_stop,
            told=lambda done, count: self.told("examine", done, count),
        )
        # First: what the record names must be there after a power cut.
        flush(directory, lambda done, count: self.told("flush", done, count))
        self.before_deciding()
        context = self._context(claim.id)
        record = compose(claim, layouts, base=directory, context=context, found=found)
        record = record.model_copy(update={"duplicate_of": self._duplicate_of(record, context.known)})
        atomic.write_file(directory / BATCH_FILE, record.to_json().encode())
        self.told("move", 0, 0)

    def _duplicate_of(self, record: Batch, known: Known) -> str | None:
        """The batch that brought the same: by the producer's id ever, by content while it counts."""
        if record.producer_id is not None and record.producer_id in known.producer_ids:
            return known.producer_ids[record.producer_id]
        for name, state in self.ledger.twins(record):
            try:
                other = self.spool.load(name)
            except BatchError:
                continue
            if record.producer_id is not None and other.producer_id == record.producer_id:
                return other.duplicate_of or other.id
            is_open = state in {"work", "queued", "incoming"}  # what was held may be tried again
            if is_open and record.images and other.content_sha256 == record.content_sha256:
                return other.duplicate_of or other.id
        return known.contents.get(record.content_sha256) if record.images else None

    def _deliver(self, record: Batch, directory: Path) -> list[IntakeEvent]:
        """Carry out batch.json: move the images, then the batch."""
        record = move_images(
            record,
            directory,
            min_images=self.config.inbox.min_images_per_class,
            told=lambda done, count: self.told("move", done, count),
        )
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
