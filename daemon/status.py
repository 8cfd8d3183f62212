"""What is going on: from the files for anyone who asks, and in `status.json` while a daemon runs.

`status.json` is a convenience for watchers, replaced in one rename and not fsynced: it is of no use after a
crash, and nothing reads it to decide. `snapshot` reads the listing itself.
"""

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from daemon.events import EventLog
from daemon.lock import holder
from daemon.rest import Rest, read_pause
from daemon.spool import Spool
from daemon.waits import Waits
from deploy import atomic, disk
from deploy.errors import StoreError
from deploy.store import VersionStore
from deploy.store_reader import Pin

STATUS_NAME = "status.json"
LAST_DECISIONS = 8
DECISIONS = frozenset(
    (
        *("published", "held", "failed", "duplicate", "promoted", "reverted", "revert_refused"),
        *("rolled_back", "unpinned", "paused", "resumed", "retried", "discarded"),
    )
)
MIN_SECONDS = 0.25  # between two writes


class StatusFile:
    """Writes status.json, at most four times a second unless told that it matters."""

    def __init__(self, home: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = home / STATUS_NAME
        self._clock = clock
        self._written_at = float("-inf")
        self._last: dict[str, Any] | None = None

    def write(self, content: dict[str, Any], *, now_or_later: bool = False) -> None:
        """Replace the file, unless nothing changed or the last write was a moment ago.

        Args:
            now_or_later: the content may be dropped, because another call comes soon (progress within a
                phase).
        """
        if content == self._last or (now_or_later and self._clock() - self._written_at < MIN_SECONDS):
            return
        temporary = atomic.temporary_beside(self._path)
        try:
            disk.write_new(temporary, (json.dumps(content, ensure_ascii=False) + "\n").encode())
            disk.rename(temporary, self._path)
        except OSError:
            # A disk that is full or read-only must not end the daemon over a convenience.
            with contextlib.suppress(OSError):
                disk.unlink(temporary, missing_ok=True)
            return
        self._written_at, self._last = self._clock(), content

    def remove(self) -> None:
        """Nothing runs any more."""
        with contextlib.suppress(OSError):
            disk.unlink(self._path, missing_ok=True)
        self._last = None


def snapshot(home: Path) -> dict[str, Any]:
    """The state of a home, from its files: live version, pin, batches by state, what is being learnt."""
    spool, store = Spool(home), VersionStore(home / "serving")
    pid = holder(home)
    said = read_status(home) if pid is not None else {}
    content: dict[str, Any] = {"home": str(home), "daemon": pid, "state": said.get("state", "stopped")}
    content |= live_version(store)
    content["working"] = said.get("working")
    content["revising"] = said.get("revising")
    content["taking_in"] = said.get("taking_in")
    content["batches"] = {
        state: spool.ids(state) for state in ("incoming", "queued", "work", "held", "failed")
    } | {"done": len(spool.ids("done"))}
    content["discarded"] = spool.discarded()
    told = EventLog(home).tail()
    content["inbox"] = said.get("inbox", []) if pid is not None else _left_lying(told)
    content["trouble"] = said.get("trouble")
    content["mlflow"] = said.get("mlflow")
    content["rests"] = said.get("rests") or _paused(home)
    content["oldest_at"] = said.get("oldest_at", Waits(spool).oldest_at())
    decisions = [entry for entry in told if entry["event"] in DECISIONS]
    content["decisions"] = decisions[-LAST_DECISIONS:]
    return content


def _left_lying(told: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the last daemon said of everything in the inbox that is still there."""
    found: dict[str, str] = {}
    for entry in told:
        if entry["event"] == "started":
            found.clear()
        elif entry["event"] == "inbox_problem" and isinstance(entry.get("path"), str):
            found[entry["path"]] = str(entry.get("why"))
    return [sentence for path, sentence in found.items() if os.path.lexists(path)]


def _paused(home: Path) -> dict[str, Any] | None:
    pause = read_pause(home)
    return Rest("paused", pause.sentence).to_dict() if pause else None


def live_version(store: VersionStore) -> dict[str, Any]:
    """`live` and `pin`; `live_error` says why there is no live version."""
    try:
        return {"live": store.current(), "pin": pin_fields(store.pin())}
    except StoreError as error:
        return {"live": None, "pin": None, "live_error": str(error)}


def pin_fields(pin: Pin | None) -> dict[str, Any] | None:
    """A pin as JSON values."""
    return pin.model_dump(mode="json") if pin else None


def read_status(home: Path) -> dict[str, Any]:
    """The content of status.json; empty when there is none."""
    try:
        found = json.loads((home / STATUS_NAME).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is the operating system's "no space left"."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False


def describe(error: OSError, where: object = "no file named") -> str:
    """What the operating system refused, in a sentence; where that has a remedy, with what to do.

    Args:
        where: named instead where the error names no file.
    """
    what = f"{error.strerror or error}: {error.filename or where}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"too many files are open ({what}); allow the daemon more (LimitNOFILE=, ulimit -n)"
    return f"the disk is full ({what}); free some space" if is_full_disk(error) else what
