"""Many pictures, one after the other, with bounded memory: decoding overlaps with inference.

    iterable ──► reader thread ──► decoding threads ──► queue, in order ──► batches ──► answers, in order

The reader takes from the iterable as fast as answers are taken away, and no faster: at most LOOK_AHEAD
batches are decoded or waiting. A batch is whatever has arrived when the model is free, so a slow source is
answered picture by picture and a fast one in full batches.
"""

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from deploy.errors import ImageError
from deploy.preprocess import ImageSource, Preprocessing, decode_image
from deploy.runtime import LoadedVersion, Prediction

LOOK_AHEAD = 2  # batches
_DECODING_THREADS = 2  # more than feed the model, and few beside its own
_POLL_SECONDS = 0.1  # how often a reader that waits looks whether anybody still listens

Source = TypeVar("Source")
Decoded = TypeVar("Decoded")


@dataclass(frozen=True)
class StreamAnswer:
    """What a version says of one picture of a stream, or why the picture could not be used.

    Attributes:
        index: the picture's place in the stream, from 0.
        unknown: how unlike all labels it is, if that was asked for.
        error: set where the picture cannot be used; there are no predictions then, and the stream goes on.
    """

    index: int
    version: int
    predictions: tuple[Prediction, ...] = ()
    unknown: float | None = None
    error: ImageError | None = None


@dataclass(frozen=True)
class Question:
    """What is asked about each picture; as for deploy.client.Client.classify."""

    labels: Sequence[str] | None
    top: int
    unknown: bool


@dataclass(frozen=True)
class _Picture:
    """A picture as one version wants it; the source is kept for a version that wants another size."""

    source: ImageSource
    preprocessing: Preprocessing
    pixels: NDArray[np.float32]  # (3, height, width)


Hold = Callable[[], AbstractContextManager[LoadedVersion]]


def answer_stream(
    hold: Hold, images: Iterable[ImageSource], question: Question, *, batch_size: int
) -> Iterator[StreamAnswer]:
    """Yield an answer for each picture, in order.

    Args:
        hold: lends the live version.
    """

    def prepare(source: ImageSource) -> _Picture:
        with hold() as loaded:
            preprocessing = loaded.preprocessing
        return _prepared(source, preprocessing)

    places = itertools.count()
    with Ahead(images, prepare, batch_size=batch_size, threads=_DECODING_THREADS) as ahead:
        for batch in ahead.batches():
            yield from _answer_batch(hold, [(next(places), item) for item in batch], question)


def _prepared(source: ImageSource, preprocessing: Preprocessing) -> _Picture:
    return _Picture(source, preprocessing, preprocessing([decode_image(source)])[0])


def _answer_batch(
    hold: Hold, batch: list[tuple[int, Future[_Picture]]], question: Question
) -> list[StreamAnswer]:
    """Answer the pictures of one batch, all from one version."""
    pictures: dict[int, _Picture] = {}
    errors: dict[int, ImageError] = {}
    for index, item in batch:
        try:
            pictures[index] = item.result()
        except ImageError as error:
            errors[index] = error
    with hold() as loaded:
        good = _classified(loaded, pictures, question)
        bad = [StreamAnswer(index, loaded.version, error=error) for index, error in errors.items()]
    return sorted([*good, *bad], key=lambda answer: answer.index)


def _classified(
    loaded: LoadedVersion, pictures: dict[int, _Picture], question: Question
) -> list[StreamAnswer]:
    if not pictures:
        return []
    pixels = [
        (p if p.preprocessing == loaded.preprocessing else _prepared(p.source, loaded.preprocessing)).pixels
        for p in pictures.values()
    ]
    embeddings = loaded.encode_pixels(np.stack(pixels))
    ranked = loaded.rank(embeddings, question.labels, top=question.top)
    unknown: Sequence[float | None] = [None] * len(ranked)
    if question.unknown:
        unknown = loaded.unknown(embeddings, question.labels)
    return [
        StreamAnswer(index, loaded.version, tuple(predictions), score)
        for index, predictions, score in zip(pictures, ranked, unknown, strict=True)
    ]


class _End:
    """The iterable is used up, or failed with an error that is passed on."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Ahead(Generic[Source, Decoded]):
    """Prepares the items of an iterable in threads, in order, a bounded number ahead; a context manager.

    Args:
        source: is iterated in a thread of its own.
        prepare: called for each item in one of several threads; may raise.
        batch_size: items of a batch at most.
        threads: that prepare.
    """

    def __init__(
        self, source: Iterable[Source], prepare: Callable[[Source], Decoded], *, batch_size: int, threads: int
    ) -> None:
        self._source, self._prepare, self._batch_size = source, prepare, batch_size
        self._queue: queue.Queue[Future[Decoded] | _End] = queue.Queue(LOOK_AHEAD * batch_size)
        self._is_over = threading.Event()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dynlora-decode")
        self._reader = threading.Thread(target=self._read, name="dynlora-stream", daemon=True)

    def __enter__(self) -> "Ahead[Source, Decoded]":
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        # A source that waits for something (a camera) ends in its own time: its thread is not waited for.
        self._is_over.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def batches(self) -> Iterator[list[Future[Decoded]]]:
        """Yield what has arrived, in order, at most a batch at a time; waits only for the first of each.

        Raises:
            Exception: what the iterable raised, after the items before it.
        """
        while True:
            items = [self._queue.get()]
            while len(items) < self._batch_size and not isinstance(items[-1], _End):
                try:
                    items.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            if batch := [item for item in items if not isinstance(item, _End)]:
                yield batch
            if isinstance(end := items[-1], _End):
                if end.error is not None:
                    raise end.error
                return

    def _read(self) -> None:
        end = _End()
        try:
            for item in self._source:
                if self._is_over.is_set() or not self._put(self._pool.submit(self._prepare, item)):
                    return
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever takes the answers
            end = _End(error)
        self._put(end)

    def _put(self, item: Future[Decoded] | _End) -> bool:
        """Wait for a free place; False when nobody listens any more."""
        while not self._is_over.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False
