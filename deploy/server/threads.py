"""Threads that wait for work under one condition, and how they end: with what waits done."""

import threading
from collections.abc import Callable


class WaitingThreads:
    """So many threads that run one function, which returns once ``is_closed`` and nothing waits.

    Attributes:
        changed: guards what they wait for, and wakes them.
        is_closed: read and set under ``changed``.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.is_closed = False
        self._threads: list[threading.Thread] = []

    def start(self, work: Callable[[], None], *, name: str, count: int) -> None:
        """Begin; whatever ``work`` looks at is there already."""
        self._threads = [
            threading.Thread(target=work, name=f"dynlora-{name}-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Have them finish what waits; returns when they have ended."""
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()
        for thread in self._threads:
            thread.join()
