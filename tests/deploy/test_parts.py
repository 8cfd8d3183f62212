"""Rows are answered in their order, however they are divided among runs."""

import threading

import numpy as np
import pytest

from deploy.parts import MAX_BATCH, run_in_parts


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 7, MAX_BATCH + 1])
def test_every_row_gets_its_answer(count: int, at_once: int) -> None:
    """As if there had been one run."""
    rows = np.arange(2 * count, dtype=np.float32).reshape(count, 2)
    assert (run_in_parts(lambda part: part + 1, rows, 2, at_once=at_once) == rows + 1).all()


def test_several_runs_go_on_at_the_same_time() -> None:
    """Each waits for the other, so one after the other they would never end."""
    both = threading.Barrier(2, timeout=60)

    def run(part: np.ndarray) -> np.ndarray:
        both.wait()
        return part

    run_in_parts(run, np.zeros((2, 1), np.float32), 1, at_once=2)


def test_no_run_gets_more_rows_than_memory_is_meant_for() -> None:
    """One run at a time takes many rows, several at once take few each."""
    sizes: list[int] = []

    def run(part: np.ndarray) -> np.ndarray:
        sizes.append(len(part))
        return part

    rows = np.zeros((MAX_BATCH + 1, 1), np.float32)
    run_in_parts(run, rows, 1)
    assert sizes == [MAX_BATCH, 1]
    sizes.clear()
    run_in_parts(run, rows, 1, at_once=2)
    assert max(sizes) == 4


def test_what_a_run_raises_is_raised() -> None:
    """Also from another thread."""

    def run(_part: np.ndarray) -> np.ndarray:
        raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        run_in_parts(run, np.zeros((4, 1), np.float32), 1, at_once=2)
