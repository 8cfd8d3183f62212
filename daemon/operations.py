"""Commands that change which version is live: the code behind them, with a daemon running or without."""

from collections.abc import Callable

from daemon.requests import Answer, Request
from deploy.errors import DeployError, StoreError
from deploy.store import VersionStore

Tell = Callable[..., None]


def apply(request: Request, store: VersionStore, tell: Tell) -> Answer:
    """Carry out one command; the caller holds the home's lock. What goes wrong becomes the answer.

    Args:
        tell: called with an event's name and fields once its effect is on disk; must not fail, for the effect
            is there then.
    """
    try:
        return (
            _roll_back(request, store, tell)
            if request.command == "rollback"
            else _unpin(request, store, tell)
        )
    except (DeployError, OSError) as error:
        return Answer(exit_code=1, error=str(error))


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


def _live(store: VersionStore) -> int | None:
    """The live version; None where `current` is broken, which a roll-back mends."""
    try:
        return store.current()
    except DeployError:
        return None
