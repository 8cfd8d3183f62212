"""Rows that are prepared on threads: their order, what fails, and how long a batch waits for them."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.server.batching import Batcher
from deploy.server.preparing import Preparer

MAX_ROWS = 4
LIMIT_SECONDS = 30

Scenario = Callable[[Preparer, Batcher], Awaitable[None]]


class Sizes:
    """A run that doubles its rows and notes how many it got."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        self.found.append(len(rows))
        return 2 * rows


def run(scenario: Scenario, *, threads: int = 1, max_delay_seconds: float = LIMIT_SECONDS) -> None:
    """Run a scenario with threads of its own; one that waited the whole delay would run out of time."""

    async def main() -> None:
        batcher = Batcher(threads=threads, max_rows=MAX_ROWS, max_delay_seconds=max_delay_seconds)
        preparer = Preparer(batcher)
        try:
            async with asyncio.timeout(LIMIT_SECONDS):
                await scenario(preparer, batcher)
        finally:
            await asyncio.to_thread(preparer.close)
            await asyncio.to_thread(batcher.close)

    asyncio.run(main())


def row(value: float) -> np.ndarray:
    """One row."""
    return np.full((1, 2), value, np.float32)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, MAX_ROWS + 2), min_size=1, max_size=8), st.integers(1, 3))
def test_everybody_gets_his_own_rows_in_the_order_of_his_parts(sizes: list[int], threads: int) -> None:
    """Whatever the numbers of parts and of threads."""

    async def scenario(preparer: Preparer, _: Batcher) -> None:
        values = iter(range(sum(sizes)))
        requests = [[next(values) for _ in range(size)] for size in sizes]
        answers = await asyncio.gather(
            *(preparer(double, [lambda value=value: row(value) for value in request]) for request in requests)
        )
        for request, answer in zip(requests, answers, strict=True):
            assert [2 * value for value in request] == answer.outputs[:, 0].tolist()

    def double(rows: np.ndarray) -> np.ndarray:
        return 2 * rows

    run(scenario, threads=threads, max_delay_seconds=0.001)


def test_a_batch_waits_for_rows_that_are_being_prepared() -> None:
    """While the one thread that prepares is at work, running would only take its core: one batch of four."""
    sizes, is_open = Sizes(), threading.Event()

    def slow() -> np.ndarray:
        assert is_open.wait(LIMIT_SECONDS)
        return row(2)

    async def scenario(preparer: Preparer, batcher: Batcher) -> None:
        tasks = [asyncio.create_task(preparer(sizes, [part])) for part in (lambda: row(1), slow, slow, slow)]
        # Until the first row waits, or did not.
        while not (batcher._filling or sizes.found):  # noqa: ASYNC110 - the batcher tells nobody
            await asyncio.sleep(0.001)
        is_open.set()
        await asyncio.gather(*tasks)

    run(scenario)
    assert sizes.found == [MAX_ROWS]


def test_a_lone_request_does_not_wait() -> None:
    """Nothing else is being prepared, so nothing is waited for."""
    sizes = Sizes()

    async def scenario(preparer: Preparer, _: Batcher) -> None:
        for _ in range(3):
            await preparer(sizes, [lambda: row(1)])

    run(scenario)
    assert sizes.found == [1, 1, 1]


def test_a_batch_does_not_wait_while_a_preparing_thread_is_free() -> None:
    """One slow picture on two threads holds nobody up."""
    sizes, is_open = Sizes(), threading.Event()

    def slow() -> np.ndarray:
        assert is_open.wait(LIMIT_SECONDS)
        return row(2)

    async def scenario(preparer: Preparer, batcher: Batcher) -> None:
        task = asyncio.create_task(preparer(sizes, [slow]))
        await asyncio.sleep(0)
        await batcher(sizes, row(1))
        await preparer(sizes, [lambda: row(1)])
        is_open.set()
        await task

    run(scenario, threads=2)
    assert sizes.found == [1, 1, 1]


def test_a_part_that_fails_fails_its_request_alone() -> None:
    """The others run, those that waited for it too, and the thread goes on."""
    sizes, is_open = Sizes(), threading.Event()

    def broken() -> np.ndarray:
        assert is_open.wait(LIMIT_SECONDS)
        raise ValueError("not a picture")

    async def scenario(preparer: Preparer, _: Batcher) -> None:
        good = asyncio.create_task(preparer(sizes, [lambda: row(1)]))
        bad = asyncio.create_task(preparer(sizes, [broken, lambda: row(2)]))
        await asyncio.sleep(0)
        is_open.set()
        with pytest.raises(ValueError, match="not a picture"):
            await bad
        assert (await good).outputs[0, 0] == 2
        assert (await preparer(sizes, [lambda: row(3)])).outputs[0, 0] == 6

    run(scenario)
    assert sizes.found == [1, 1]


def test_what_nobody_waits_for_is_not_prepared() -> None:
    """A request that gave up costs no more work, and holds no batch up."""
    sizes, is_open = Sizes(), threading.Event()
    prepared: list[int] = []

    def slow() -> np.ndarray:
        assert is_open.wait(LIMIT_SECONDS)
        return row(1)

    def note() -> np.ndarray:
        prepared.append(1)
        return row(2)

    async def scenario(preparer: Preparer, _: Batcher) -> None:
        first = asyncio.create_task(preparer(sizes, [slow]))
        second = asyncio.create_task(preparer(sizes, [note]))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        is_open.set()
        await first

    run(scenario)
    assert sizes.found == [1]
    assert prepared == []
