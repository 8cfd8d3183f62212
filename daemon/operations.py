"""Commands that are done at once: the code behind them, with a daemon running or without.

What takes long (promote, revert, rebuild) is daemon.revision's.
"""

from daemon.errors import DaemonError
from daemon.forget import forget
from daemon.publish import Publisher, Tell
from daemon.requests import Answer, Request
from daemon.rest import Pause, read_pause, remove_pause, write_pause
from daemon.retrying import discard, retry
from deploy import space
from deploy.errors import DeployError, StoreError
from deploy.space import Freed
from deploy.store import VersionStore


def apply(request: Request, publisher: Publisher) -> Answer:
    """Carry out one command; the caller holds the home's lock. What goes wrong becomes the answer.

    Events are told once their effect is on disk; telling must not fail, for the effect is there then.
    """
    store, tell = publisher.store, publisher.tell
    try:
        if request.command == "rollback":
            return _roll_back(request, store, tell)
        if request.command == "unpin":
            return _unpin(request, store, tell)
        if request.command in ("pause", "resume"):
            return _pause_or_resume(request, publisher)
        if request.command == "thin":
            return _freed(request, space.thin(store, request.versions), tell, "thinned")
        if request.command == "prune":
            return _freed(request, space.prune(store, request.versions), tell, "pruned")
        if (of_batch := _OF_BATCH.get(request.command)) is not None:
            return of_batch(request, publisher)
    except (DeployError, DaemonError, OSError) as error:
        return Answer(exit_code=1, error=str(error))
    return Answer(exit_code=2, error=f"{request.command} is not done at once")


def rollback_target(store: VersionStore) -> int:
    """The version to go back to when none is named: the parent of the live one.

    Raises:
        StoreError: there is no live version, or it has no parent.
    """
    live = store.live_manifest()
    if live.parent is None:
        raise StoreError(f"version {live.version} is live and has no parent to roll back to")
    return live.parent


def pinned_version(store: VersionStore) -> int:
    """The version that `unpin` releases.

    Raises:
        StoreError: nothing is pinned.
    """
    if (pin := store.pin()) is None:
        raise StoreError("no version is pinned; there is nothing to release")
    return pin.version


def _roll_back(request: Request, store: VersionStore, tell: Tell) -> Answer:
    before = _live(store)
    to = store.roll_back(request.to, who=request.who, why=request.why)
    tell("rolled_back", version=to, before=before, who=request.who, why=request.why or None)
    return Answer(exit_code=0, result={"live": to, "before": before, "pinned": True})


def _unpin(request: Request, store: VersionStore, tell: Tell) -> Answer:
    pin = store.pin()
    if pin is not None and request.to not in (None, pin.version):
        now = f"version {pin.version} is pinned now, by {pin.who} ({pin.why})"
        why = f"{now}, and no longer version {request.to}: nothing was released; look at `dynlora status`"
        return Answer(exit_code=1, error=why)
    if pin is not None:  # else it was released before a crash kept that from being answered
        store.unpin(request.who)
        tell("unpinned", version=pin.version, who=request.who)
    released = request.to if pin is None else pin.version
    return Answer(exit_code=0, result={"unpinned": released, "live": _live(store)})


def _pause_or_resume(request: Request, publisher: Publisher) -> Answer:
    home, tell = publisher.home, publisher.tell
    before = read_pause(home)
    if request.command == "pause":
        write_pause(home, Pause(who=request.who, why=request.why))
        tell("paused", who=request.who, why=request.why or None)
        return Answer(exit_code=0, result={"paused": True})
    remove_pause(home)
    if before is not None:  # else it was over before a crash kept that from being answered
        tell("resumed", who=request.who)
    return Answer(exit_code=0, result={"paused": False, "was_paused": before is not None})


def _freed(request: Request, freed: Freed, tell: Tell, event: str) -> Answer:
    """What was removed; `kept` says of the other versions why they had to stay as they are."""
    for version in freed.versions:
        tell(event, version=version, who=request.who, why=request.why or None)
    kept = {str(version): why for version, why in freed.kept.items()}
    return Answer(exit_code=0, result={"versions": freed.versions, "bytes": freed.bytes, "kept": kept})


def _forget(request: Request, publisher: Publisher) -> Answer:
    """Whatever was learnt so far of a batch that is not published goes too; the caller stopped its worker."""
    home, spool, batch_id = publisher.home, publisher.spool, request.batch or ""
    published = publisher.store.published_batches().get(batch_id)
    if spool.find(batch_id) in ("work", "held") and published is not None:
        publisher.finish(batch_id, published.version)
    elif spool.find(batch_id) in (
        "work",
        "queued",
    ):  # one that waits for its next attempt has been learnt from
        publisher.discard_learning(batch_id)
    inbox = publisher.config.inbox_dir(home)
    found = forget(home, inbox, batch_id, who=request.who, why=request.why)
    counts = sum(found["images"].values())
    publisher.tell("forgotten", batch=batch_id, files=counts, who=request.who, why=request.why or None)
    return Answer(exit_code=0, result=found)


def _retry(request: Request, publisher: Publisher) -> Answer:
    found = retry(publisher, request.batch or "")
    publisher.tell("retried", batch=request.batch, who=request.who, why=request.why or None)
    return Answer(exit_code=0, result=found)


def _discard(request: Request, publisher: Publisher) -> Answer:
    found = discard(publisher, request.batch or "", who=request.who, why=request.why)
    files = sum(found["images"].values())
    publisher.tell("discarded", batch=request.batch, files=files, who=request.who, why=request.why or None)
    return Answer(exit_code=0, result=found)


_OF_BATCH = {"forget": _forget, "retry": _retry, "discard": _discard}


def _live(store: VersionStore) -> int | None:
    """The live version; None where `current` is broken, which a roll-back mends."""
    try:
        return store.current()
    except DeployError:
        return None
