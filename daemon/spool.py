"""The spool: a batch is in the state whose directory it is in, and changes state by one rename.

    incoming   being gathered or unpacked; claim.json first; intake finishes it or fails it
    queued     images/ + batch.json, waiting
    work       a worker has it
    done       published (or a duplicate); batch.json stays when the images are gone
    held       not published on evidence; delta and report beside it
    failed     reason.json beside it

Every operation is durable when it returns. Knows nothing of learning, versions or the inbox.
"""

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from daemon.batch import BATCH_FILE, Batch, Forgotten, read_batch, sequence
from daemon.errors import BatchError, DaemonError
from deploy import atomic, disk

State = Literal["incoming", "queued", "work", "done", "held", "failed"]
STATES: tuple[State, ...] = get_args(State)
REASON_FILE = "reason.json"
CLAIM_FILE = "claim.json"
_UNMARKED = b'"forgotten": null'  # in no other place: quotes within a name are escaped
_LEFT = TypeAdapter(dict[str, str])


class Reason(BaseModel):
    """reason.json: why a batch failed, in a sentence, and what to do about it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: str
    reason: str
    what_to_do: str
    failed_at: str  # UTC, ISO 8601
    details: list[str] = []
    forgotten: Forgotten | None = None  # on whose word what was sent was removed


@dataclass(frozen=True)
class Recovery:
    """What a listing of the spool calls for after a crash."""

    remove: list[Path]  # half-written leftovers, relative to the spool
    resume: list[str]  # claimed: intake goes on with them
    interrupted: list[str]  # were being worked on


def plan_recovery(listing: Mapping[State, Mapping[str, Iterable[str]]]) -> Recovery:
    """A function of the listing alone: state → batch id → names in its directory."""
    remove = [
        Path(state, name) for state, entries in listing.items() for name in entries if _is_leftover(name)
    ]
    remove += [
        Path(state, name, inner)
        for state, entries in listing.items()
        for name, names in entries.items()
        for inner in names
        if sequence(name) and _is_leftover(inner)
    ]
    incoming = {name: set(names) for name, names in listing.get("incoming", {}).items() if sequence(name)}
    # Nothing leaves the inbox before claim.json is on disk, so a directory without it holds nothing.
    remove += [Path("incoming", name) for name, names in incoming.items() if CLAIM_FILE not in names]
    resume = [name for name, names in incoming.items() if CLAIM_FILE in names]
    interrupted = [name for name in listing.get("work", {}) if sequence(name)]
    return Recovery(remove, sorted(resume, key=_order), sorted(interrupted, key=_order))


class Spool:
    """The spool of one home."""

    def __init__(self, home: Path) -> None:
        self.root = home / "spool"

    def create(self) -> None:
        """Make the state directories; harmless when they exist."""
        disk.make_dirs(self.root.parent)
        atomic.make_dir(self.root)
        for state in STATES:
            atomic.make_dir(self.root / state)

    def state_dir(self, state: State) -> Path:
        """The directory of one state."""
        return self.root / state

    def ids(self, state: State) -> list[str]:
        """The batches in one state, in working order."""
        try:
            names = [entry.name for entry in os.scandir(self.root / state)]
        except FileNotFoundError:
            return []
        found = [(number, name) for name in names if (number := sequence(name)) is not None]
        return [name for _, name in sorted(found)]

    def find(self, batch: str) -> State | None:
        """The state a batch is in, or None."""
        if sequence(batch) is None:
            return None
        return next((state for state in STATES if (self.root / state / batch).is_dir()), None)

    def path(self, batch: str) -> Path:
        """Where a batch is now.

        Raises:
            BatchError: nowhere.
        """
        state = self.find(batch)
        if state is None:
            raise BatchError(f"there is no batch {batch!r} in {self.root}; `dynlora status` lists them")
        return self.root / state / batch

    def load(self, batch: str) -> Batch:
        """The record of a batch.

        Raises:
            BatchError: there is no such batch, or its record is missing or damaged.
        """
        return read_batch(self.path(batch))

    def save(self, batch: Batch) -> None:
        """Replace the record of a batch that is in the spool."""
        atomic.write_file(self.path(batch.id) / BATCH_FILE, batch.to_json().encode())

    def move(self, batch: str, state: State) -> Path:
        """One durable rename; harmless when the batch is there already."""
        source, target = self.path(batch), self.root / state / batch
        if source != target:
            atomic.rename(source, target)
        return target

    def fail(self, reason: Reason) -> Path:
        """Write reason.json, then move the batch to failed/."""
        path = self.path(reason.batch) / REASON_FILE
        atomic.write_file(path, (reason.model_dump_json(indent=1, exclude_none=True) + "\n").encode())
        return self.move(reason.batch, "failed")

    def reason(self, batch: str) -> Reason:
        """Why a batch failed.

        Raises:
            BatchError: there is no readable reason.json.
        """
        path = self.path(batch) / REASON_FILE
        try:
            return Reason.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise BatchError(f"{path} cannot be read: {error}") from error

    def discarded(self) -> list[str]:
        """The failed batches whose images an operator removed: nothing is left to do about them."""
        found = []
        for batch in self.ids("failed"):
            with suppress(BatchError):  # it left just now, or has no reason that can be read
                if self.reason(batch).forgotten is not None:
                    found.append(batch)
        return found

    def batches(self, *states: State) -> Iterator[Batch]:
        """The readable records in these states (default: all), in working order within a state."""
        for state in states or STATES:
            for name in self.ids(state):
                try:
                    yield read_batch(self.root / state / name)
                except BatchError:
                    continue  # incoming or failed before it had a record

    def listed(self) -> dict[str, tuple[State, Callable[[], Batch | None]]]:
        """Every batch with its state and what reads its record; None where there is no readable one."""

        def reading(directory: Path) -> Callable[[], Batch | None]:
            return lambda: _read_or_none(directory)

        return {
            name: (state, reading(self.root / state / name)) for state in STATES for name in self.ids(state)
        }

    def forgotten(self, *states: State) -> Iterator[Batch]:
        """The records in these states that are marked as forgotten; the others are glanced at only."""
        for directory in (self.root / state / name for state in states for name in self.ids(state)):
            try:
                is_unmarked = _UNMARKED in (directory / BATCH_FILE).read_bytes()
            except FileNotFoundError:
                continue
            batch = None if is_unmarked else _read_or_none(directory)
            if batch is not None and batch.forgotten is not None:
                yield batch

    def recover(self) -> Recovery:
        """Remove leftovers of writes cut short; say what is to be resumed. Harmless to repeat."""
        for leftover in self.root.glob(f"{atomic.TEMPORARY_PREFIX}*"):
            atomic.remove_file(leftover)
        listing = {
            state: {entry.name: _names(entry) for entry in (self.root / state).iterdir()}
            for state in STATES
            if (self.root / state).is_dir()
        }
        plan = plan_recovery(listing)
        for leftover in plan.remove:
            atomic.remove_tree(self.root / leftover)
        return plan

    def left_behind(self) -> dict[str, str]:
        """Drops that were copied because they could not be moved: inbox name → fingerprint.

        Raises:
            DaemonError: the list is damaged; says what deleting it would mean.
        """
        path = self.root / "left.json"
        if not path.exists():
            return {}
        try:
            return _LEFT.validate_json(path.read_bytes())
        except ValueError as error:
            raise DaemonError(
                f"{path} is damaged. It names the drops that were copied because they could not be moved out "
                "of the inbox; take those out of the inbox, then delete this file, else they are learnt again"
            ) from error

    @contextmanager
    def changing_left_behind(self) -> Iterator[dict[str, str]]:
        """The list of drops that were copied, to be changed; written when the block ends.

        The daemon and the process that takes in a large drop may come at the same time: one waits.
        """
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            left = self.left_behind()
            yield left
            atomic.write_json(self.root / "left.json", left)
        finally:
            os.close(descriptor)


def _read_or_none(directory: Path) -> Batch | None:
    try:
        return read_batch(directory)
    except BatchError:
        return None


def _is_leftover(name: str) -> bool:
    return name.startswith(atomic.TEMPORARY_PREFIX)


def _names(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir()] if path.is_dir() else []


def _order(identifier: str) -> tuple[int, str]:
    return sequence(identifier) or 0, identifier
