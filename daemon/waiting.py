"""`dynlora submit --wait`: follow one drop by its producer's id until something final has become of it."""

import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from daemon.batch import BATCH_FILE, Batch, why_not_after_held
from daemon.errors import BatchError, InboxError, RequestError
from daemon.layout import SUBMITTED_FILE
from daemon.lock import holder
from daemon.progress import View
from daemon.report import DECISION_NAME, RESULT_DIR
from daemon.source import read_submitted
from daemon.spool import STATES, Spool, State
from daemon.status import read_status
from deploy.manifest import Decision
from deploy.store import VersionStore

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 5.0  # a daemon that is being restarted comes back within this time


def batches_now(home: Path) -> frozenset[str]:
    """Every batch there is: what is submitted from now on becomes none of them."""
    spool = Spool(home)
    return frozenset(name for state in STATES for name in spool.ids(state))


def wait_for(home: Path, producer_id: str, view: View, *, earlier: Collection[str] = ()) -> dict[str, Any]:
    """Wait until the drop is published, a duplicate, held or failed; returns that as an event's fields,
    with the sentences about what was set aside and what else was noticed, and the record that has them.

    Args:
        earlier: batches from before the submission; one of them may have had the same id.

    Raises:
        RequestError: no daemon is running to learn it; the drop stays where it is.
    """
    spool = Spool(home)
    seen_at = time.monotonic()
    found: tuple[State, str] | None = None
    while True:
        if found is None:
            found = find(spool, producer_id, earlier)
        elif (state := spool.find(found[1])) is not None:  # None only while it is being renamed
            found = state, found[1]
        if found is not None and (outcome := _outcome(home, spool, *found)) is not None:
            return outcome | _notes(spool, found[1])
        now = time.monotonic()
        seen_at = now if holder(home) is not None else seen_at
        if now - seen_at > PATIENCE_SECONDS:
            where = f"waits in {spool.state_dir(found[0])}" if found else "is in the inbox"
            raise RequestError(f"the drop {where}, but no daemon is running; start one with `dynlora run`")
        _show(view, found[1] if found else None, read_status(home))
        time.sleep(POLL_SECONDS)


def find(spool: Spool, producer_id: str, earlier: Collection[str] = ()) -> tuple[State, str] | None:
    """The state and id of the batch that a drop became; None while it is in the inbox."""
    batches = [(state, name) for state in STATES for name in spool.ids(state) if name not in earlier]
    for state, batch_id in batches:  # its own note first: batch.toml may have given the batch another id
        notes = (spool.state_dir(state) / batch_id).glob(f"source/*/{SUBMITTED_FILE}")
        if any(_is_from(path.parent, producer_id) for path in notes):
            return state, batch_id
    return next((found for found in batches if _has_id(spool, found[1], producer_id)), None)


def _has_id(spool: Spool, batch_id: str, producer_id: str) -> bool:
    try:
        return spool.load(batch_id).producer_id == producer_id
    except BatchError:  # no record yet, or refused before it had one
        return False


def _is_from(wrapper: Path, producer_id: str) -> bool:
    try:
        note = read_submitted(wrapper)
    except InboxError:
        return False
    return note is not None and note.id == producer_id


def _outcome(home: Path, spool: Spool, state: State, batch_id: str) -> dict[str, Any] | None:
    if state == "failed":
        return {"event": "failed", "batch": batch_id, "why": spool.reason(batch_id).reason}
    if state == "held":
        path = spool.state_dir("held") / batch_id / RESULT_DIR / DECISION_NAME
        decision = Decision.model_validate_json(path.read_bytes())
        why = "; ".join(rule.detail for rule in decision.rules if not rule.passed)
        return {"event": "held", "batch": batch_id, "why": why}
    if state != "done":
        return None
    batch: Batch = spool.load(batch_id)
    if (twin := batch.duplicate_of) is not None and spool.find(twin) == "held":
        why = why_not_after_held(batch.producer_id, twin)
        return {"event": "held", "batch": batch_id, "duplicate_of": twin, "why": why}
    if batch.duplicate_of is not None:
        return {"event": "duplicate", "batch": batch_id, "duplicate_of": batch.duplicate_of}
    store = VersionStore(home / "serving")
    published, live = store.published_batches()[batch_id], store.current()
    return {"event": "published", "batch": batch_id, "version": published.version, "live": live}


def _notes(spool: Spool, batch_id: str) -> dict[str, Any]:
    try:
        batch = spool.load(batch_id)
    except BatchError:  # refused before it had a record
        return {}
    found = {"set_aside": [item.sentence for item in batch.set_aside], "warnings": batch.warnings}
    record = str(spool.path(batch_id) / BATCH_FILE)
    return {"record": record} | found if any(found.values()) else {}


def _show(view: View, batch_id: str | None, status: dict[str, Any]) -> None:
    working = status.get("working") or {}
    if batch_id is not None and working.get("batch") == batch_id:
        view.update(working.pop("phase", "start"), **working)
    else:
        view.update("waiting", batch=batch_id)
