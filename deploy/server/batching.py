"""Dynamic batching: rows that wait together run together. Knows nothing of HTTP, models or versions.

    event loop                     runner threads, one ONNX Runtime thread each
    rows, future ──► waiting ──►   the oldest, and all behind it for the same run, up to `max_rows`
    future done  ◄──────────────   one call, its rows dealt out again

A runner that is free takes what is there. A batch that is not full waits for more only

- under load (the last batch held several requests), at most ``max_delay_seconds`` after its first rows came;
- while all threads that prepare rows (see deploy.server.preparing) are at work: running would only take a
  core from them, and one row at a time. At most PREPARING_FACTOR times as long.

A lone request never waits.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.server.threads import WaitingThreads

Array = NDArray[Any]
Run = Callable[[Any], Array]

PREPARING_FACTOR = 10


@dataclass(frozen=True)
class Ran:
    """Outputs (rows, dim) of one request's rows, and how long they were prepared, waited and ran."""

    outputs: Array
    is_finite: bool  # all outputs of the whole batch
    prepare_seconds: float
    queue_seconds: float
    infer_seconds: float


@dataclass(eq=False, slots=True)
class Item:
    """One request's rows on their way; times by time.monotonic."""

    run: Run
    rows: Array
    future: "asyncio.Future[Ran]"
    asked: float
    since: float  # its rows wait


class Batcher:
    """Runs rows in batches on threads of its own; await ``batcher(run, rows)`` on the event loop.

    Args:
        threads: how many batches run at once, and how many threads prepare rows, if any do.
        max_rows: rows per batch; more rows of a single request run alone.
        max_delay_seconds: how long a batch may wait to be filled.
    """

    def __init__(self, *, threads: int, max_rows: int, max_delay_seconds: float) -> None:
        self.threads = threads
        self._max_rows = max_rows
        self._max_delay_seconds = max_delay_seconds
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Item] = deque()
        self._waiting_rows = 0
        self._coming = 0  # parts of requests that are being prepared or wait for it
        self._filling = 0  # threads that let a batch wait
        self._is_busy = False  # several requests shared the last batch
        self._runners = WaitingThreads()
        self._changed = self._runners.changed
        self._runners.start(self._work, name="run", count=threads)

    async def __call__(self, run: Run, rows: Array) -> Ran:
        """Return ``run``'s outputs for these rows, computed together with others'.

        Requests share a batch if their ``run`` is equal. ``run`` maps (N, …) to (N, dim) row by row.
        """
        now = time.monotonic()
        item = Item(run, rows, self._loop.create_future(), now, now)
        self.put(item)
        return await item.future

    def expect(self, parts: int) -> None:
        """Say that so many parts of requests are going to be prepared."""
        with self._changed:
            self._coming += parts

    def put(self, item: Item | None, *, parts: int = 0) -> None:
        """Queue rows, from any thread; ``parts`` of what was expected were prepared, or never will be."""
        with self._changed:
            self._coming -= parts
            if item is not None:
                self._waiting.append(item)
                self._waiting_rows += len(item.rows)
            # Each waking costs as much as parsing a request: not for every row of a batch that fills up.
            is_last = parts > 0 and self._coming < self.threads
            if self._waiting and (not self._filling or is_last or self._waiting_rows >= self._max_rows):
                self._changed.notify()

    def close(self) -> None:
        """Finish what waits, then end the threads."""
        self._runners.close()

    def _work(self) -> None:
        while batch := self._take():
            started = time.monotonic()
            try:
                outputs = batch[0].run(_joined(batch))
                whole = Ran(outputs, bool(np.isfinite(outputs).all()), 0, 0, time.monotonic() - started)
            except Exception as error:  # noqa: BLE001 - whoever waits for it gets it
                self._loop.call_soon_threadsafe(_fail, batch, error)
            else:
                self._loop.call_soon_threadsafe(_deliver, batch, whole, started)

    def _take(self) -> list[Item]:
        """Wait for a batch and take it; empty when closed."""
        with self._changed:
            while True:
                self._drop_cancelled()
                if not self._waiting:
                    if self._runners.is_closed:
                        return []
                    self._changed.wait()
                    continue
                batch, is_full = self._ready()
                left = batch[0].since + self._patience_seconds() - time.monotonic()
                if is_full or left <= 0 or self._runners.is_closed:
                    self._remove(batch)
                    return batch
                self._filling += 1
                self._changed.wait(left)
                self._filling -= 1

    def _patience_seconds(self) -> float:
        """How long the oldest rows may wait for others."""
        if self._coming >= self.threads:
            return self._max_delay_seconds * PREPARING_FACTOR
        return self._max_delay_seconds if self._is_busy else 0.0

    def _drop_cancelled(self) -> None:
        while self._waiting and self._waiting[0].future.cancelled():
            self._waiting_rows -= len(self._waiting.popleft().rows)

    def _remove(self, batch: list[Item]) -> None:
        if len(batch) == len(self._waiting):
            self._waiting.clear()
        else:
            taken = set(map(id, batch))
            self._waiting = deque(item for item in self._waiting if id(item) not in taken)
        self._waiting_rows = sum(len(item.rows) for item in self._waiting)
        self._is_busy = len(batch) > 1 or bool(self._waiting)
        if self._filling:
            self._changed.notify_all()  # who let these rows wait for more sleeps for nothing now
        elif self._waiting:
            self._changed.notify()  # for another thread, if one is free

    def _ready(self) -> tuple[list[Item], bool]:
        """Return what could run now, the oldest first, and whether no more would fit."""
        first = self._waiting[0]
        batch: list[Item] = []
        rows = 0
        for item in self._waiting:
            if batch and rows >= self._max_rows:
                break
            if item is first or (item.run == first.run and not item.future.cancelled()):
                if batch and rows + len(item.rows) > self._max_rows:
                    return batch, True
                batch.append(item)
                rows += len(item.rows)
        return batch, rows >= self._max_rows


def _joined(batch: list[Item]) -> Array:
    """A request that is alone runs on its own memory, the body that came in, if that is aligned."""
    if len(batch) == 1:
        return np.require(batch[0].rows, requirements=["A", "C"])
    return np.concatenate([item.rows for item in batch])


def _deliver(batch: list[Item], whole: Ran, started: float) -> None:
    start = 0
    for item in batch:
        stop = start + len(item.rows)
        if not item.future.done():  # its request may have run out of time
            prepared, waited = item.since - item.asked, started - item.since
            outputs = whole.outputs[start:stop]
            item.future.set_result(Ran(outputs, whole.is_finite, prepared, waited, whole.infer_seconds))
        start = stop


def _fail(batch: list[Item], error: Exception) -> None:
    for item in batch:
        if not item.future.done():
            item.future.set_exception(error)
