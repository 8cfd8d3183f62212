"""Dynamic batching: rows that wait together run together. Knows nothing of HTTP, models or versions.

    event loop                     runner threads, one ONNX Runtime thread each
    rows, future ──► waiting ──►   the oldest, and all behind it for the same run, up to `max_rows`
    future done  ◄──────────────   one call, its rows dealt out again

A runner that is free takes what is there. Only under load (the last batch held several requests) it
lets a batch that is not full wait, at most ``max_delay_seconds`` after its first rows came: a lone
request never waits.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Run = Callable[[Any], Array]


@dataclass(frozen=True)
class Ran:
    """Outputs (rows, dim) of one request's rows, and how long they waited and ran."""

    outputs: Array
    queue_seconds: float
    infer_seconds: float


@dataclass(eq=False)
class _Item:
    run: Run
    rows: Array
    future: "asyncio.Future[Ran]"
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Runs rows in batches on threads of its own; await ``batcher(run, rows)`` on the event loop.

    Args:
        threads: how many batches run at once.
        max_rows: rows per batch; more rows of a single request run alone.
        max_delay_seconds: how long a batch may wait to be filled.
    """

    def __init__(self, *, threads: int, max_rows: int, max_delay_seconds: float) -> None:
        self._max_rows = max_rows
        self._max_delay_seconds = max_delay_seconds
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Item] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._is_busy = False  # several requests shared the last batch
        self._threads = [
            threading.Thread(target=self._work, name=f"dynlora-run-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    async def __call__(self, run: Run, rows: Array) -> Ran:
        """Return ``run``'s outputs for these rows, computed together with others'.

        Requests share a batch if their ``run`` is equal. ``run`` maps (N, …) to (N, dim) row by row.
        """
        item = _Item(run, rows, self._loop.create_future())
        with self._changed:
            self._waiting.append(item)
            self._changed.notify()
        return await item.future

    def close(self) -> None:
        """Finish what waits, then end the threads."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while batch := self._take():
            started = time.monotonic()
            outcome: Array | Exception
            try:
                outcome = batch[0].run(_joined(batch))
            except Exception as error:  # noqa: BLE001 - whoever waits for it gets it
                outcome = error
            self._loop.call_soon_threadsafe(_deliver, batch, outcome, started, time.monotonic())

    def _take(self) -> list[_Item]:
        """Wait for a batch and take it; empty when closed."""
        with self._changed:
            while True:
                while self._waiting and self._waiting[0].future.cancelled():
                    self._waiting.popleft()
                if not self._waiting:
                    if self._is_closed:
                        return []
                    self._changed.wait()
                    continue
                batch, is_full = self._ready()
                left = batch[0].since + self._max_delay_seconds - time.monotonic()
                if is_full or left <= 0 or not self._is_busy or self._is_closed:
                    taken = set(map(id, batch))
                    self._waiting = deque(item for item in self._waiting if id(item) not in taken)
                    self._is_busy = len(batch) > 1 or bool(self._waiting)
                    return batch
                self._changed.wait(left)

    def _ready(self) -> tuple[list[_Item], bool]:
        """Return what could run now, the oldest first, and whether no more would fit."""
        first = self._waiting[0]
        batch, rows = [first], len(first.rows)
        for item in list(self._waiting)[1:]:
            if rows >= self._max_rows:
                break
            if item.run == first.run and not item.future.cancelled():
                if rows + len(item.rows) > self._max_rows:
                    return batch, True
                batch.append(item)
                rows += len(item.rows)
        return batch, rows >= self._max_rows


def _joined(batch: list[_Item]) -> Array:
    """A request that is alone runs on its own memory, the body that came in, if that is aligned."""
    if len(batch) == 1:
        return np.require(batch[0].rows, requirements=["A", "C"])
    return np.concatenate([item.rows for item in batch])


def _deliver(batch: list[_Item], outcome: Array | Exception, started: float, ended: float) -> None:
    start = 0
    for item in batch:
        stop = start + len(item.rows)
        if not item.future.done():  # its request may have run out of time
            if isinstance(outcome, Exception):
                item.future.set_exception(outcome)
            else:
                item.future.set_result(Ran(outcome[start:stop], started - item.since, ended - started))
        start = stop
