"""Batches on their own: whose rows come back to whom, whatever shares a batch, fails or gives up."""

import asyncio
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.server.batching import Batcher, Ran

MAX_ROWS = 4
LIMIT_SECONDS = 30


def double(rows: np.ndarray) -> np.ndarray:
    """Row by row, as a model."""
    return 2 * rows


class Gate:
    """A run that waits until it is opened, so that requests pile up behind it; notes its batch sizes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.is_running = threading.Event()
        self.open = threading.Event()

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        self.sizes.append(len(rows))
        self.is_running.set()
        assert self.open.wait(LIMIT_SECONDS)
        return double(rows)


def run(scenario, *, threads: int = 1) -> None:
    """Run a scenario with a batcher of its own."""

    async def main() -> None:
        batcher = Batcher(threads=threads, max_rows=MAX_ROWS, max_delay_seconds=0.001)
        try:
            async with asyncio.timeout(LIMIT_SECONDS):
                await scenario(batcher)
        finally:
            await asyncio.to_thread(batcher.close)

    asyncio.run(main())


async def pile_up(batcher: Batcher, gate: Gate, requests: list[np.ndarray]) -> list[asyncio.Task[Ran]]:
    """Occupy the only thread with one request, let the others wait behind it."""
    tasks = [asyncio.create_task(batcher(gate, np.zeros((1, 2), np.float32)))]
    await asyncio.to_thread(gate.is_running.wait, LIMIT_SECONDS)
    for rows in requests:
        tasks.append(asyncio.create_task(batcher(gate, rows)))
        await asyncio.sleep(0)  # lets it take its place in the queue
    return tasks


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, MAX_ROWS + 2), min_size=1, max_size=12), st.integers(1, 3))
def test_everybody_gets_the_outputs_of_his_own_rows(sizes: list[int], threads: int) -> None:
    """Whatever the sizes of the requests and however many threads."""
    values = iter(np.arange(sum(sizes) * 2, dtype=np.float32).reshape(-1, 2))
    requests = [np.stack([next(values) for _ in range(size)]) for size in sizes]

    async def scenario(batcher: Batcher) -> None:
        answers = await asyncio.gather(*(batcher(double, rows) for rows in requests))
        for rows, answer in zip(requests, answers, strict=True):
            np.testing.assert_array_equal(answer.outputs, 2 * rows)

    run(scenario, threads=threads)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, MAX_ROWS + 2), min_size=1, max_size=10))
def test_a_batch_holds_no_more_rows_than_allowed_unless_one_request_does(sizes: list[int]) -> None:
    """A request with more rows runs alone."""
    gate = Gate()

    async def scenario(batcher: Batcher) -> None:
        tasks = await pile_up(batcher, gate, [np.ones((size, 2), np.float32) for size in sizes])
        gate.open.set()
        await asyncio.gather(*tasks)

    run(scenario)
    assert sum(gate.sizes) == 1 + sum(sizes)
    assert all(size <= MAX_ROWS or size in sizes for size in gate.sizes)


def test_requests_that_wait_together_run_together() -> None:
    """Four rows of four requests are one batch."""
    gate = Gate()

    async def scenario(batcher: Batcher) -> None:
        tasks = await pile_up(batcher, gate, [np.ones((1, 2), np.float32)] * MAX_ROWS)
        gate.open.set()
        await asyncio.gather(*tasks)

    run(scenario)
    assert gate.sizes == [1, MAX_ROWS]


def test_requests_of_different_runs_share_no_batch() -> None:
    """Another version, or another tower, is another run."""
    gate, other = Gate(), Gate()
    other.open.set()

    async def scenario(batcher: Batcher) -> None:
        tasks = await pile_up(batcher, gate, [np.ones((1, 2), np.float32)])
        tasks.append(asyncio.create_task(batcher(other, np.ones((1, 2), np.float32))))
        await asyncio.sleep(0)
        gate.open.set()
        await asyncio.gather(*tasks)

    run(scenario)
    assert gate.sizes == [1, 1]
    assert other.sizes == [1]


def test_a_request_that_gave_up_is_not_computed() -> None:
    """Its rows are left out, the others' answers stay right."""
    gate = Gate()

    async def scenario(batcher: Batcher) -> None:
        requests = [np.full((1, 2), value, np.float32) for value in (1, 2, 3)]
        first, one, two, three = await pile_up(batcher, gate, requests)
        two.cancel()
        await asyncio.sleep(0)
        gate.open.set()
        await first
        assert [(await task).outputs[0, 0] for task in (one, three)] == [2, 6]

    run(scenario)
    assert gate.sizes == [1, 2]


def test_an_error_reaches_everybody_in_its_batch_and_nobody_else() -> None:
    """The thread goes on with the next batch."""

    def fail(_: np.ndarray) -> np.ndarray:
        raise RuntimeError("no memory")

    async def scenario(batcher: Batcher) -> None:
        rows = np.ones((1, 2), np.float32)
        with pytest.raises(RuntimeError, match="no memory"):
            await batcher(fail, rows)
        np.testing.assert_array_equal((await batcher(double, rows)).outputs, 2 * rows)

    run(scenario)


def test_a_thread_whose_batch_another_one_took_is_there_for_the_next_rows() -> None:
    """Both let the same rows wait for more; one runs them, and what comes then must not wait for that run."""

    async def scenario() -> None:
        batcher = Batcher(threads=2, max_rows=MAX_ROWS, max_delay_seconds=1000)
        busy, long = [Gate(), Gate()], Gate()
        rows = np.ones((1, 2), np.float32)
        try:
            async with asyncio.timeout(LIMIT_SECONDS):
                asked = []
                for gate in busy:
                    asked.append(asyncio.create_task(batcher(gate, rows)))
                    await asyncio.to_thread(gate.is_running.wait, LIMIT_SECONDS)
                batcher.expect(2)
                asked.append(asyncio.create_task(batcher(long, rows)))
                await asyncio.sleep(0)
                for gate in busy:
                    gate.open.set()
                while batcher._filling < 2:  # noqa: ASYNC110 - a counter of the threads
                    await asyncio.sleep(0.001)
                batcher.put(None, parts=1)  # fewer parts are prepared than there are threads: no more waiting
                await asyncio.to_thread(long.is_running.wait, LIMIT_SECONDS)
                answer = await batcher(double, rows)
                np.testing.assert_array_equal(answer.outputs, 2 * rows)
                assert not asked[-1].done()
        finally:
            for gate in (*busy, long):
                gate.open.set()
            await asyncio.gather(*asked)
            await asyncio.to_thread(batcher.close)

    asyncio.run(scenario())
