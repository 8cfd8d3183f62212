"""What the batches of a spool brought, remembered: a record is read once, however many batches there are.

The files are the truth. `look` lists the states and reads the records that are new; a batch that is gone from
the spool makes it all be read again. So a drop costs the same after ten batches as after ten thousand. What
can change in a record (attempts, what it is a duplicate of) is not remembered. Batches in incoming/ count as
soon as they have a record, which is read again when it changes.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from daemon.batch import BATCH_FILE, Batch, BatchClass, read_batch, sequence
from daemon.compose import KnownClass
from daemon.errors import BatchError
from daemon.split import History
from daemon.spool import STATES, Spool, State

_SETTLED_NS = 2_000_000_000  # a directory's time of change is no finer than the clock's ticks


@dataclass(frozen=True, slots=True)
class _Entry:
    """What is remembered of one batch beside its images' hashes."""

    producer_id: str | None
    content_sha256: str | None  # None where there are no images
    classes: tuple[BatchClass, ...]
    has_images: bool


@dataclass(frozen=True, slots=True)
class _Record:
    """What a record said, and what file it was."""

    key: tuple[int, int, int]
    entry: _Entry
    images: tuple[frozenset[str], frozenset[str]]  # hashes: that grade, that are learnt from


class _MovedError(Exception):
    """A batch left incoming/ while it was being looked at."""


@dataclass(frozen=True, slots=True)
class _Listing:
    """The names in one state, and whether an unchanged time of the directory vouches for them."""

    names: frozenset[str]
    changed_ns: int
    is_settled: bool


class Coming(Mapping[str, KnownClass]):
    """The classes of batches on their way, by key, each as the first of them spells it."""

    def __init__(self) -> None:
        self._found: dict[str, dict[tuple[int, str], KnownClass]] = {}

    def __getitem__(self, key: str) -> KnownClass:
        """The class as it was first spelled."""
        found = self._found[key]
        return found[min(found)]

    def __iter__(self) -> Iterator[str]:
        """All keys."""
        return iter(self._found)

    def __len__(self) -> int:
        """How many classes are on their way."""
        return len(self._found)

    def add(self, batch: str, classes: Iterable[BatchClass]) -> None:
        """A batch is on its way."""
        for entry in classes:
            self._found.setdefault(entry.key, {})[_order(batch)] = KnownClass(entry.name, entry.template)

    def remove(self, batch: str, classes: Iterable[BatchClass]) -> None:
        """A batch is no longer on its way; harmless where it never was."""
        for entry in classes:
            found = self._found.get(entry.key, {})
            found.pop(_order(batch), None)
            if not found:
                self._found.pop(entry.key, None)


class Ledger:
    """The memory of one spool."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._highest = 0
        self._clear()

    def _clear(self) -> None:
        self._listings: dict[State, _Listing] = {}
        self._states: dict[str, State] = {}
        self._entries: dict[str, _Entry | None] = {}  # None: it has no readable record
        self._exam: set[str] = set()
        self._trained: set[str] = set()
        self._by_producer: dict[str, list[str]] = {}
        self._by_content: dict[str, list[str]] = {}
        self._coming_in: dict[str, _Record] = {}  # in incoming/, and decided about
        self.coming = Coming()

    def look(self) -> None:
        """Take over what has changed since the last look."""
        if self._take_over():
            self._clear()
            self._take_over()

    def _take_over(self) -> bool:
        """Read what is new; says whether something is gone, by which the rest cannot be mended."""
        added: list[tuple[str, State]] = []
        removed: list[tuple[str, State]] = []
        for state in STATES:
            before = self._listings.get(state)
            listing = self._list(state, before)
            if listing is before:
                continue
            known = before.names if before is not None else frozenset()
            self._listings[state] = listing
            added += [(name, state) for name in sorted(listing.names - known)]
            removed += [(name, state) for name in known - listing.names]
        is_stale = False
        for batch, state in added:
            number = sequence(batch)
            if number is not None:
                self._highest = max(self._highest, number)
                is_stale |= self._enter(batch, state)
        return is_stale | any(self._states.get(batch) == state for batch, state in removed)

    def _list(self, state: State, before: _Listing | None) -> _Listing:
        directory = self._spool.state_dir(state)
        try:
            changed_ns = directory.stat().st_mtime_ns
            if before is not None and before.is_settled and before.changed_ns == changed_ns:
                return before
            is_settled = time.time_ns() - changed_ns > _SETTLED_NS
            names = frozenset(entry.name for entry in os.scandir(directory))
        except FileNotFoundError:
            return before if before is not None and not before.names else _Listing(frozenset(), 0, False)
        if before is not None and before.names == names and not is_settled:
            return before
        return _Listing(names, changed_ns, is_settled)

    def _enter(self, batch: str, state: State) -> bool:
        """A batch is in this state now; says whether what it was before is worth nothing any more."""
        self._states[batch] = state
        entry = self._entries.get(batch)
        if state == "incoming":  # it is taken in anew, and may become another batch
            self._entries.pop(batch, None)
            return entry is not None and entry.has_images
        if entry is None:
            entry = self._entries[batch] = self._remember(batch, state)
        if entry is not None:
            (self.coming.add if state in ("queued", "work") else self.coming.remove)(batch, entry.classes)
        return False

    def _remember(self, batch: str, state: State) -> _Entry | None:
        record = self._record(batch, self._spool.state_dir(state) / batch)
        self._coming_in.pop(batch, None)
        if record is None:
            return None  # it failed before it had one
        self._exam |= record.images[0]
        self._trained |= record.images[1]
        if record.entry.producer_id is not None:
            self._by_producer.setdefault(record.entry.producer_id, []).append(batch)
        if record.entry.content_sha256 is not None:
            self._by_content.setdefault(record.entry.content_sha256, []).append(batch)
        return record.entry

    def _record(self, batch: str, directory: Path) -> _Record | None:
        """What there is to remember of a record; what was read in incoming/ is not read again."""
        try:
            found = (directory / BATCH_FILE).stat()
            key = found.st_ino, found.st_mtime_ns, found.st_size
            known = self._coming_in.get(batch)
            if known is not None and known.key == key:
                return known
            batch_record = read_batch(directory)
        except (BatchError, FileNotFoundError):
            return None
        images = batch_record.images
        exam = frozenset(image.sha256 for image in images if image.split == "exam")
        trained = frozenset(image.sha256 for image in images if image.split != "exam")
        content = batch_record.content_sha256 if images else None
        entry = _Entry(batch_record.producer_id, content, tuple(batch_record.classes), bool(images))
        return _Record(key, entry, (exam, trained))

    def next_seq(self, highest_published: int = 0) -> int:
        """One more than any seq in the spool, now or since the first look, and than `highest_published`."""
        return 1 + max(self._highest, highest_published)

    def history(self, *, without: str | None = None) -> History:
        """Every image hash that graded or was learnt from, in all batches but `without`, now."""
        while True:
            self.look()
            try:
                coming = self._decided(without)
            except _MovedError:
                continue  # out of incoming/, and into what the next look finds
            break
        if not coming:
            return History(self._exam, self._trained)
        exams, trained = ([found.images[which] for found in coming] for which in (0, 1))
        return History(self._exam.union(*exams), self._trained.union(*trained))

    def _decided(self, without: str | None) -> list[_Record]:
        """What is known of batches in incoming/ that have a record."""
        names = self._listings["incoming"].names - {without}
        found = {}
        for name in names:
            directory = self._spool.state_dir("incoming") / name
            if sequence(name) is None:
                continue
            if (record := self._record(name, directory)) is not None:
                found[name] = record
            elif not directory.is_dir():
                raise _MovedError
        self._coming_in = found
        return list(found.values())

    def twins(self, record: Batch) -> Iterator[tuple[str, State]]:
        """Batches that may have brought the same, by producer's id or by content, with the state of each.

        Those at work come first, then queued, held and done ones, and at last those that are being taken in;
        what failed may be tried again. As of the last `history`.
        """
        names = set(self._by_producer.get(record.producer_id or "", ()))
        if record.images:
            names |= set(self._by_content.get(record.content_sha256, ()))
        states: tuple[State, ...] = ("work", "queued", "held", "done")
        for state in states:
            for name in sorted((n for n in names if self._states.get(n) == state), key=_order):
                if name != record.id:
                    yield name, state
        for name, found in self._coming_in.items():
            is_same = found.entry.content_sha256 == record.content_sha256
            if is_same or (record.producer_id and found.entry.producer_id == record.producer_id):
                yield name, "incoming"


def _order(batch: str) -> tuple[int, str]:
    return sequence(batch) or 0, batch
