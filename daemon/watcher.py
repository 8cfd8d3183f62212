"""Wake the daemon when something happens in the inbox. A hint only: the scan finds everything by itself."""

import logging
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from daemon import logs

RENEW_SECONDS = 60.0  # between two looks whether the watch is still the right one


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

    Where events cannot be had (no inotify watches left, a file system without them), the scans every
    scan_seconds do alone. Events that the kernel drops because too many came are no loss: those before them
    have woken us, and the scan goes by what lies there.

    Attributes:
        why_not: why there are no events, in a sentence; None while they come.
    """

    def __init__(self, inbox: Path, *wakes: threading.Event) -> None:
        self._inbox, self._wakes = inbox, wakes
        self._observer: BaseObserver | None = None
        self._watched: tuple[int, int] | None = None  # device and inode
        self._looked_at = 0.0
        self.why_not: str | None = None

    @property
    def works(self) -> bool:
        """Whether events come."""
        return self._observer is not None

    def __enter__(self) -> Self:
        self.renew(time.monotonic())
        return self

    def renew(self, now: float) -> None:
        """Now and then, try again where events could not be had, or where another folder is the inbox now.

        Args:
            now: of a clock that is never set back, in seconds.
        """
        if self._looked_at and now - self._looked_at < RENEW_SECONDS:
            return
        self._looked_at = now
        try:
            found = self._inbox.stat()
        except OSError:
            return  # the scan says so, and what it is about
        identity = found.st_dev, found.st_ino
        if self.works and identity == self._watched:
            return
        self._stop()
        try:
            # Not recursive: one watch, however much is dropped. A folder that is filling up is scanned again
            # until it is quiet anyway.
            observer = Observer()
            observer.schedule(_Wake(self._wakes), str(self._inbox), recursive=False)
            observer.start()
        except OSError as error:
            why = f"{self._inbox} gives no file events ({error.strerror or error}); it is looked at regularly"
            if why != self.why_not:
                logs.log("no file events", level=logging.WARNING, why=why)
            self.why_not = why
            return
        self._observer, self._watched, self.why_not = observer, identity, None
        for wake in self._wakes:  # what came before the watch
            wake.set()

    def _stop(self) -> None:
        if self._observer is not None:
            self._observer.stop()
            self._observer.join()
            self._observer = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
