"""Commands that change which version is live: the code behind them, with a daemon running or without."""

from collections.abc import Callable

from daemon.requests import Answer, Request
from deploy.errors import DeployError, StoreError
from deploy.store import VersionStore

Tell = Callable[..., None]


def apply(request: Request, store: VersionStore, tell: Tell) -> Answer:
    """Carry out one command; the caller holds the home's lock. What goes wrong becomes the answer.

    Args:
        tell: called with an event's name and fields once its effect is on disk.
    """
    try:
        if request.command == "rollback":
            return _roll_back(request, store, tell)
        pin = store.unpin(request.who)
    except (DeployError, OSError) as error:
        return Answer(exit_code=1, error=str(error))
    tell("unpinned", version=pin.version, who=request.who)
    return Answer(exit_code=0, result={"unpinned": pin.version, "live": store.current()})


def rollback_target(store: VersionStore) -> int:
    """The version to go back to when none is named: the parent of the live one.

    Raises:
        StoreError: there is no live version, or it has no parent.
    """
    live = store.live_manifest()
    if live.parent is None:
        raise StoreError(f"version {live.version} is live and has no parent to roll back to")
    return live.parent


def _roll_back(request: Request, store: VersionStore, tell: Tell) -> Answer:
    before = _live(store)
    to = store.roll_back(request.to, who=request.who, why=request.why)
    tell("rolled_back", version=to, before=before, who=request.who, why=request.why or None)
    return Answer(exit_code=0, result={"live": to, "before": before, "pinned": True})


def _live(store: VersionStore) -> int | None:
    """The live version; None where `current` is broken, which a roll-back mends."""
    try:
        return store.current()
    except DeployError:
        return None
