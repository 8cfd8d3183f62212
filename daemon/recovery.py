"""What a listing calls for: pure functions, so that a killed daemon goes on where the files say it was.

The service asks `next_step` about every batch in work/ whenever no worker runs. Going on after a crash and
going on normally are therefore the same code, and the same code is tested all the time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from daemon.batch import Batch
from daemon.spool import State
from deploy.manifest import Manifest
from deploy.store_reader import StoreReader

_PUBLICATIONS = {
    "initial": "initialised",
    "promote": "promoted",
    "revert": "reverted",
    "regraph": "regraphed",
}
_TOLD_OF_VERSIONS = {"published", *_PUBLICATIONS.values()}
_ENDS = ("published", "promoted", "duplicate")  # of a batch in done/
Listed = tuple[State, Callable[[], Batch | None]]
Step = Literal["finish", "judge", "redo", "restart", "resume"]


class Published(Mapping[int, Manifest]):
    """The manifests of a store by number, each read when it is asked for."""

    def __init__(self, store: StoreReader) -> None:
        self._store = store

    def __getitem__(self, version: int) -> Manifest:
        """The manifest; raises StoreError where it cannot be read."""
        return self._store.manifest(version)

    def __iter__(self) -> Iterator[int]:
        """All numbers, oldest first."""
        return iter(self._store.versions())

    def __len__(self) -> int:
        """How many versions there are."""
        return len(self._store.versions())


@dataclass(frozen=True)
class WorkListing:
    """What lies on disk for one batch in work/.

    Attributes:
        published_as: the version that holds this batch, if there is one.
        report_parent: the parent named in the worker's report; None without a readable report.
        plan_parent: the parent named in plan.json; None without a plan.
        has_staging: the staged version is there.
    """

    published_as: int | None = None
    report_parent: int | None = None
    plan_parent: int | None = None
    has_staging: bool = False


def next_step(listing: WorkListing, live: int) -> Step:
    """What to do with a batch in work/ while no worker runs.

    finish    it is published: keep its exam, move it to done/
    judge     the worker is done and all it made is there: publish or hold
    redo      the report is there but the staged version is gone: let the worker make it again
    restart   it was learnt on top of another version than the live one: throw that away and start over
    resume    let a worker start, or go on from its checkpoint
    """
    if listing.published_as is not None:
        return "finish"
    if listing.report_parent is not None:
        if listing.report_parent != live:
            return "restart"
        return "judge" if listing.has_staging else "redo"
    if listing.plan_parent is not None and listing.plan_parent != live:
        return "restart"
    return "resume"


def publication(manifest: Manifest) -> dict[str, Any]:
    """The event that tells of a version: its name, version and batch; who and why where people decided."""
    event = _PUBLICATIONS.get(manifest.kind, "published")
    rules = manifest.decision.rules if manifest.decision else ()
    why = next((rule.detail for rule in rules if rule.rule == "operator"), None)
    batch_id = manifest.batch.id if manifest.batch else None
    return {
        "event": event,
        "batch": batch_id,
        "version": manifest.version,
        "who": manifest.operator,
        "why": why,
    }


def missing_events(
    known: Iterable[Mapping[str, Any]], versions: Mapping[int, Manifest], batches: Mapping[str, Listed]
) -> Iterator[dict[str, Any]]:
    """Events that should be in the log and are not, as arguments for `EventLog.append`.

    A crash between an effect and its line loses the line. Every version and every batch that left work/ gets
    the one event that says so; what the files do not say (when a batch was claimed, say) is not made up. A
    batch that is published but still in work/ or held/ is told when it is finished.

    Args:
        versions: number → manifest; asked only for those that no event tells of.
        batches: id → state and record; the record is asked for likewise.
    """
    unfinished = {name for name, (state, _) in batches.items() if state in ("work", "held")}  # promoted
    published: set[int] = set()
    told: set[tuple[str, str]] = set()
    for entry in known:
        if entry["event"] in _TOLD_OF_VERSIONS:
            published.add(entry.get("version", -1))
        if entry.get("batch") is not None:
            told.add((entry["event"], entry["batch"]))
    for version in versions:
        if version not in published:
            manifest = versions[version]
            told_as = publication(manifest)
            if manifest.kind == "revert" or told_as["batch"] not in unfinished:
                yield {**told_as, "at": manifest.created_at, "late": True}
    for name, (state, load) in batches.items():
        is_known = any((event, name) in told for event in (_ENDS if state == "done" else (state,)))
        if state not in ("held", "failed", "done") or is_known:
            continue
        batch = load()
        if batch is not None and (state != "done" or batch.duplicate_of):
            event = "duplicate" if state == "done" else state
            yield {"event": event, "at": _last_known(batch), "batch": name, "late": True}


def _last_known(batch: Batch) -> datetime:
    """The latest time that the record of a batch names."""
    return datetime.fromisoformat(batch.attempts[-1].started_at if batch.attempts else batch.received_at)
