"""A home goes over to the release that is installed: its format, and the graphs of its versions.

Format 1 is the only one there has been, so nothing on disk is rewritten; `check_home` refuses a newer one.
The graphs of a store stay as they were exported for as long as nobody asks: a newer torch, onnxscript or
opset would write other bytes, and clients know a graph by its hash. This is where somebody asks.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from daemon.budget import check_space, version_bytes
from daemon.config import Config
from daemon.events import EventLog
from daemon.foreground import run_worker
from daemon.home import FORMAT, check_home
from daemon.lock import HomeLock
from daemon.progress import View
from daemon.requests import current_user
from daemon.sharing import signer
from deploy import atomic
from deploy.errors import StoreError
from deploy.manifest import GRAPH_NAMES, Decision, Manifest, RuleResult
from deploy.store import VersionStore

_STAGING_NAME = "regraph"  # as daemon.regraphing, which only the worker may import


def migrate(home: Path, config: Config, view: View, *, is_check: bool, why: str = "") -> dict[str, Any]:
    """Publish the live weights under new graphs, if what is installed exports other ones.

    Args:
        is_check: only say what would be done.

    Returns:
        `format`, `live`, `is_current` (nothing is to be done), `graphs` {name: (sha256 now, then)} where they
        differ, `software` {name: (then, now)} where that differs, `version` that was published or None.

    Raises:
        LockError: a daemon runs, or another command.
        StoreError: a version is pinned, or the disk is too full.
        WorkerError: the export or its verification failed; nothing was changed.
    """
    check_home(home)
    with HomeLock(home):
        store = VersionStore(home / "serving", sign=signer(config))
        store.complete()
        _check_pin(store)
        live = store.live_manifest()
        check_space(home, config.disk, {"the version": version_bytes(live)}, "export its graphs anew")
        arguments = ["regraph", "--home", str(home), "--parent", str(live.version)]
        staging = store.staging_dir(_STAGING_NAME)
        try:
            draft = run_worker(home, arguments, view).get("draft")
            found = _found(live, draft)
            if draft is not None and not is_check:
                found["version"] = _publish(store, staging, draft, why)
                EventLog(home).record("regraphed", version=found["version"], who=current_user())
        finally:
            atomic.remove_tree(staging)
        return found


def _publish(store: VersionStore, staging: Path, draft: dict[str, Any], why: str) -> int:
    detail = f"{current_user()} asked for the graphs of the installed release{f': {why}' if why else ''}"
    rule = RuleResult(rule="operator", passed=True, detail=detail)
    given = {
        "version": store.next_version(),
        "created_at": datetime.now(UTC),
        "operator": current_user(),
        "decision": Decision(outcome="publish", rules=(rule,)),
    }
    return store.publish(staging, Manifest(**(draft | given)))


def _found(live: Manifest, draft: dict[str, Any] | None) -> dict[str, Any]:
    found = {"format": FORMAT, "live": live.version, "is_current": draft is None, "version": None}
    if draft is None:
        return found | {"graphs": {}, "software": {}}
    then, now = live.software, draft["software"]
    other = {name: [then.get(name), now[name]] for name in now if then.get(name) != now[name]}
    files = draft["files"]
    graphs = {name: [live.files[name].sha256, files[name]["sha256"]] for name in GRAPH_NAMES}
    changed = {name: pair for name, pair in graphs.items() if pair[0] != pair[1]}
    return found | {"graphs": changed, "software": other}


def _check_pin(store: VersionStore) -> None:
    if (pin := store.pin()) is not None:
        raise StoreError(
            f"version {pin.version} is pinned by {pin.who}: nothing is published until `dynlora unpin`"
        )
