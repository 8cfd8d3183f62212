"""Wake the daemon when something happens in the inbox. A hint only: the scan finds everything by itself."""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer


class _Wake(FileSystemEventHandler):
    def __init__(self, wakes: tuple[threading.Event, ...]) -> None:
        self._wakes = wakes

    def on_any_event(self, event: FileSystemEvent) -> None:
        # Our own scans open and close folders; waking for those would never let the daemon sleep.
        if event.event_type not in {"opened", "closed_no_write"}:
            for wake in self._wakes:
                wake.set()


class Watcher:
    """A context manager that sets all `wakes` on any change among the entries of `inbox`.

    Where events cannot be had (no inotify watches left, a file system without them), `works` is False and the
    scans every scan_seconds do alone.
    """

    def __init__(self, inbox: Path, *wakes: threading.Event) -> None:
        self._inbox, self._wakes = inbox, wakes
        self._observer = Observer()
        self.works = False

    def __enter__(self) -> Self:
        try:
            # Not recursive: one watch, however much is dropped. A folder that is filling up is scanned again
            # until it is quiet anyway.
            self._observer.schedule(_Wake(self._wakes), str(self._inbox), recursive=False)
            self._observer.start()
            self.works = True
        except OSError:
            self.works = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.works:
            self._observer.stop()
            self._observer.join()
