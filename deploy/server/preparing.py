"""Threads that prepare rows for a batcher: a request's parts at once, and no detour over the event loop.

event loop                 preparing threads            runner threads
parts, future ──► queue ──► rows of one part ──► all of them there: waiting ──► …
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from deploy.server.batching import Array, Batcher, Item, Ran, Run
from deploy.server.threads import WaitingThreads

Prepare = Callable[[], Array]


@dataclass(eq=False)
class _Request:
    """One request: its parts' rows, as far as they are there. Guarded by the queue's lock."""

    run: Run
    parts: Sequence[Prepare]
    future: "asyncio.Future[Ran]"
    asked: float
    rows: dict[int, Array] = field(default_factory=dict)
    has_failed: bool = False


class Preparer:
    """Prepares rows and lets them run; await ``preparer(run, parts)`` on the event loop.

    Args:
        batcher: takes what was prepared; has as many threads.
    """

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[_Request, int]] = deque()
        self._threads = WaitingThreads()
        self._changed = self._threads.changed
        self._threads.start(self._work, name="decode", count=batcher.threads)

    async def __call__(self, run: Run, parts: Sequence[Prepare]) -> Ran:
        """Return ``run``'s outputs for the rows of all parts, in their order.

        Raises:
            Exception: what the first part that failed raised, or the run.
        """
        request = _Request(run, parts, self._loop.create_future(), time.monotonic())
        self._batcher.expect(len(parts))
        with self._changed:
            self._queue.extend((request, index) for index in range(len(parts)))
            self._changed.notify(len(parts))
        return await request.future

    def close(self) -> None:
        """Finish what was begun, then end the threads; before the batcher's."""
        self._threads.close()

    def _work(self) -> None:
        while found := self._take():
            request, index = found
            item: Item | None = None
            try:
                if not request.has_failed and not request.future.cancelled():
                    item = self._add(request, index, request.parts[index]())
            except Exception as error:  # noqa: BLE001 - whoever waits for it gets it
                request.has_failed = True
                self._loop.call_soon_threadsafe(_fail, request.future, error)
            self._batcher.put(item, parts=1)

    def _take(self) -> tuple[_Request, int] | None:
        with self._changed:
            while not self._queue:
                if self._threads.is_closed:
                    return None
                self._changed.wait()
            return self._queue.popleft()

    def _add(self, request: _Request, index: int, rows: Array) -> Item | None:
        """Keep one part's rows; return the request's, if this was the last part."""
        with self._changed:
            request.rows[index] = rows
            if len(request.rows) < len(request.parts):
                return None
        if len(request.parts) > 1:
            rows = np.concatenate([request.rows[each] for each in range(len(request.parts))])
        return Item(request.run, rows, request.future, request.asked, time.monotonic())


def _fail(future: "asyncio.Future[Ran]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
