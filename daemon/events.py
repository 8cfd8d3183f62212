"""`events.jsonl`: what happened in this home, one JSON object per line, for people and programs to follow.

The files are the truth and this log only tells them again. So nothing here is needed for recovery: a torn
last line is skipped, and what is missing after a crash is told again from the manifests and batch directories
(see `daemon.recovery`), marked `"late": true`.
"""

import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from daemon import logs
from deploy import atomic

EVENTS_NAME = "events.jsonl"


class EventLog:
    """Append-only record of a home's events; one process at a time appends.

    Every line has `at` (UTC), `event` and, where they apply, `batch` and `version`.

    Args:
        max_bytes: a new file is started when the log has grown beyond this; None for never.
    """

    def __init__(self, home: Path, *, max_bytes: int | None = None) -> None:
        self._path = home / EVENTS_NAME
        self.max_bytes = max_bytes

    def append(self, event: str, *, at: datetime | None = None, **fields: Any) -> dict[str, Any]:
        """Write one event and return it. `at` defaults to now; fields that are None are left out.

        Raises:
            OSError: the disk is full; a torn line is passed over by readers and ended by the next append.
        """
        moment = (at or datetime.now(UTC)).astimezone(UTC)
        entry = {"at": moment.isoformat(timespec="milliseconds"), "event": event}
        entry |= {key: value for key, value in fields.items() if value is not None}
        self._make_fit()
        atomic.append_line(self._path, json.dumps(entry, ensure_ascii=False))
        return entry

    def record(self, event: str, **fields: Any) -> bool:
        """Append an event whose effect is on disk already; says whether that could be done.

        The files are the truth: what is missing in the log is told again at the next start of a daemon, and
        never turns what was done into a failure.
        """
        try:
            self.append(event, **fields)
        except OSError as error:
            about: dict[str, Any] = {key: fields.get(key) for key in ("batch", "version")}
            logs.log("event not recorded", level=logging.WARNING, what=event, **about, why=str(error))
            return False
        return True

    def read(self) -> list[dict[str, Any]]:
        """All events, rotated files first; lines that are not JSON objects are skipped."""
        return list(self.each())

    def each(self) -> Iterator[dict[str, Any]]:
        """As `read`, one at a time."""
        for path in [*earlier_events(self._path.parent), self._path]:
            yield from _entries(path)

    def tail(self, max_bytes: int = 1 << 18) -> list[dict[str, Any]]:
        """The last events, oldest first, from no more than so much of the end of the log."""
        paths = [*earlier_events(self._path.parent)[-1:], self._path]
        found: list[dict[str, Any]] = []
        for path in reversed(paths):
            lines = _last_lines(path, max_bytes)
            found = [*_parsed(lines), *found]
            max_bytes -= sum(map(len, lines))
            if max_bytes <= 0:
                break
        return found

    def _make_fit(self) -> None:
        """End a torn last line, start a new file when this one has grown."""
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            return
        if self.max_bytes is not None and size > self.max_bytes:
            # Nanoseconds in fixed width sort in the order of rotation.
            atomic.rename(self._path, self._path.with_name(f"events-{time.time_ns():020d}.jsonl"))
        elif size:
            with self._path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    atomic.append_line(self._path, "")


def earlier_events(home: Path) -> list[Path]:
    """The files that the log was continued from, oldest first."""
    return sorted(home.glob("events-*.jsonl"))


def rotated_at(path: Path) -> float:
    """When such a file got its last event, in seconds since the epoch; by its name, which no copy changes."""
    nanoseconds = path.stem.removeprefix("events-")
    return int(nanoseconds) / 1e9 if nanoseconds.isdecimal() else path.stat().st_mtime


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            yield from _parsed(file)
    except FileNotFoundError:
        return


def _last_lines(path: Path, max_bytes: int) -> list[bytes]:
    """The whole lines within the last bytes of a file; none where it is gone."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - max_bytes))
            lines = file.read(max_bytes).splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return lines if size <= max_bytes else lines[1:]


def _parsed(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("event"), str):
            yield entry
