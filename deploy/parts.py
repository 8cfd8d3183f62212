"""Many rows through a model: in parts, so that memory is bounded, and several parts at once where wanted."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

MAX_BATCH = 32  # rows per run: bounds the memory of one request
_SMALL_BATCH = 4  # where several run at once: larger ones are no faster, and end less evenly

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


def run_in_parts(
    run: Callable[[Float32 | Int64], Float32], rows: Float32 | Int64, dim: int, *, at_once: int = 1
) -> Float32:
    """Return (N, dim): what `run` makes of N rows.

    Args:
        at_once: how many runs there are at a time, each in a thread of its own.
    """
    answers = np.empty((len(rows), dim), np.float32)
    size = MAX_BATCH if at_once == 1 else max(1, min(_SMALL_BATCH, len(rows) // at_once))
    parts = [slice(start, start + size) for start in range(0, len(rows), size)]

    def work(part: slice) -> None:
        answers[part] = run(rows[part])

    if at_once == 1 or len(parts) < 2:
        for part in parts:
            work(part)
        return answers
    with ThreadPoolExecutor(at_once, thread_name_prefix="part") as pool:
        for done in [pool.submit(work, part) for part in parts]:
            done.result()
    return answers
