"""Work that must not get in the way of requests: a thread of low priority, and memory given back.

Only of use on Linux; elsewhere the thread is one like any other, and no memory is given back.
"""

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

# A third of a normal thread's share of a busy core. A thread cannot take its own niceness back, and threads
# that it starts inherit it: sessions, whose threads answer requests later, are opened elsewhere.
_NICENESS = 5

T = TypeVar("T")


class BackgroundThread:
    """One thread of low priority that runs functions for others, one at a time."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=_lower_priority)

    def run(self, function: Callable[[], T]) -> T:
        """Run it there, wait, and return what it returns or raise what it raises."""
        return self._pool.submit(function).result()

    def stop(self) -> None:
        """End the thread after what it is doing."""
        self._pool.shutdown()


def _lower_priority() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ours = os.getpriority(os.PRIO_PROCESS, 0)  # of this thread, on Linux; as of whoever started it
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), ours + _NICENESS)


def return_memory() -> None:
    """Give memory that is free in the C library's heap back to the system, where that is possible (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
