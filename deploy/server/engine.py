"""What all requests share: batches on ONNX Runtime, and threads that decode pictures.

Checks what a batch must not contain before it gets there: one request's bad row must not fail others'.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.errors import ImageError
from deploy.preprocess import decode_image
from deploy.runtime import LoadedVersion, Prediction
from deploy.server.batching import Batcher, Ran, Run
from deploy.server.preparing import Preparer
from deploy.server.problems import Problem
from deploy.server.settings import Limits, Settings
from deploy.server.versions import Slot

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

_QUICK_ROWS = 8  # so many pictures are ranked on the event loop, quicker than a thread would start


@dataclass
class Call:
    """One request under one version, and the seconds that its stages took."""

    slot: Slot
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def loaded(self) -> LoadedVersion:
        """The version that computes it."""
        return self.slot.loaded

    def took(self, stage: str, seconds: float) -> None:
        """Add to a stage."""
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds


class Engine:
    """Computes for the handlers; made on the event loop, closed after the last request."""

    def __init__(self, settings: Settings) -> None:
        self.limits: Limits = settings.limits
        threads = settings.threads_per_worker
        self._batcher = Batcher(
            threads=threads,
            max_rows=settings.max_batch,
            max_delay_seconds=settings.max_delay_ms / 1000,
        )
        self._preparer = Preparer(self._batcher)
        self._others = ThreadPoolExecutor(threads, thread_name_prefix="dynlora-texts")
        self._rankers = ThreadPoolExecutor(1, thread_name_prefix="dynlora-labels")

    def close(self) -> None:
        """Finish what was begun and end the threads."""
        self._preparer.close()
        self._batcher.close()
        self._others.shutdown()
        self._rankers.shutdown()

    async def embed_pixels(self, call: Call, pixel_values: Float32) -> Float32:
        """Return the embeddings (N, dim) of pixels (N, 3, H, W).

        Raises:
            Problem: a value is not finite.
        """
        return await self._run(call, call.loaded.encode_pixels, pixel_values, "pixel_values")

    async def embed_ids(self, call: Call, input_ids: Int64) -> Float32:
        """Return the embeddings (N, dim) of token ids (N, context).

        Raises:
            Problem: an id is not in the vocabulary.
        """
        size = call.loaded.vocabulary_size
        if input_ids.min() < 0 or input_ids.max() >= size:
            raise Problem(400, f"input_ids must be from 0 to {size - 1}")
        return await self._run(call, call.loaded.encode_ids, input_ids, "input_ids")

    async def tokenize(self, call: Call, texts: Sequence[str]) -> Int64:
        """Return token ids (N, context) of texts."""
        ids: Int64 = await self.in_thread(call, "decode", call.loaded.tokenize, texts)
        return ids

    async def embed_images(self, call: Call, files: Sequence[bytes]) -> Float32:
        """Return the embeddings (N, dim) of picture files.

        Raises:
            Problem: one cannot be used; says which.
        """
        parts = [
            partial(self._pixels, call.loaded, file, (index, len(files))) for index, file in enumerate(files)
        ]
        ran = await self._preparer(call.loaded.encode_pixels, parts)
        call.took("decode", ran.prepare_seconds)
        return _outputs(call, ran, "the pictures")

    async def rank(
        self, call: Call, image_embeds: Float32, labels: Sequence[str] | None, top: int
    ) -> list[list[Prediction]]:
        """Return the best labels of each picture, given their embeddings (N, dim)."""
        if labels is None and len(image_embeds) <= _QUICK_ROWS:
            return call.loaded.rank(image_embeds, top=top)
        loop = asyncio.get_running_loop()
        started = time.monotonic()

        def ranked() -> list[list[Prediction]]:
            return call.loaded.rank(image_embeds, labels, top=top)

        found = await loop.run_in_executor(self._rankers, ranked)
        call.took("rank", time.monotonic() - started)
        return found

    async def in_thread(self, call: Call, stage: str, function: Any, *arguments: Any) -> Any:
        """Run something that takes long enough to be felt on the event loop."""
        loop = asyncio.get_running_loop()
        started = time.monotonic()
        result = await loop.run_in_executor(self._others, function, *arguments)
        call.took(stage, time.monotonic() - started)
        return result

    def _pixels(self, loaded: LoadedVersion, file: bytes, place: tuple[int, int]) -> Float32:
        try:
            return loaded.preprocessing([decode_image(file, max_pixels=self.limits.image_pixels)])
        except ImageError as error:
            index, count = place
            which = f"image {index + 1} of {count}: " if count > 1 else ""
            raise Problem(400, f"{which}{error.reason}") from error

    async def _run(self, call: Call, run: Run, rows: NDArray[Any], name: str) -> Float32:
        return _outputs(call, await self._batcher(run, rows), name)


def _outputs(call: Call, ran: Ran, name: str) -> Float32:
    """Note the times and return the outputs, if they can be used."""
    call.took("queue", ran.queue_seconds)
    call.took("infer", ran.infer_seconds)
    if not ran.is_finite and not np.isfinite(ran.outputs).all():
        raise Problem(400, f"{name} lead to values that are not finite: NaN, infinite or far too large")
    return ran.outputs
