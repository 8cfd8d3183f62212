"""A client that answers from the live version and follows `current` without dropping a request.

    current → versions/12        background thread                          callers
                                 sees 13, loads it beside 12, checks it,    answered by 12
                                 warms it, switches the pointer             answered by 13
                                 closes 12 after its last request

Torch-free. Writes nothing into the store, so it may be read-only or another machine's. A new version
that cannot be loaded is reported once and tried again when it changes, or after a pause; the old one goes
on answering.
"""

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from deploy.answers import Classification, ClientEvent, Embeddings
from deploy.background import BackgroundThread, return_memory
from deploy.errors import ClientError, DeployError
from deploy.lending import LentVersion
from deploy.parts import MAX_BATCH
from deploy.preprocess import ImageSource
from deploy.runtime import DEFAULT_TOP, LoadedVersion, expect_list
from deploy.signing import TrustedKeys
from deploy.stream import Question, StreamAnswer, answer_stream
from deploy.target import Failure, Target, resolve_current, state_of

__all__ = ["Classification", "Client", "ClientEvent", "Embeddings"]

POLL_SECONDS = 0.25
STREAM_BATCH = 8

_FIRST_LOAD_ATTEMPTS = 5  # the publisher may switch and prune while the first version loads

_log = logging.getLogger(__name__)

Float32 = NDArray[np.float32]


class Client:
    """Answers from the live version of a store; safe to use from many threads.

    Args:
        serving_dir: the store: the directory that holds `current` and `versions`.
        poll_seconds: how often to look at `current`.
        threads: ONNX Runtime threads per tower; by default the CPUs this process may use: those of its
            cpuset, or fewer where a container's quota is smaller.
        trust: a file of public keys (PEM); a version that none of them has signed is refused.
        on_event: called with each ClientEvent, from the background thread (once from the constructor).

    Raises:
        StoreError: `current` is missing or leads nowhere.
        VerifyError, ManifestError: the live version is damaged.
        SignatureError: it is not signed by a trusted key, or the keys cannot be read.
    """

    def __init__(
        self,
        serving_dir: str | os.PathLike[str],
        *,
        poll_seconds: float = POLL_SECONDS,
        threads: int | None = None,
        trust: str | os.PathLike[str] | None = None,
        on_event: Callable[[ClientEvent], None] | None = None,
    ) -> None:
        if not poll_seconds > 0:
            raise ClientError(f"poll_seconds must be above 0, found {poll_seconds}")
        self._serving_dir = Path(serving_dir).absolute()
        self._threads = threads
        self._trust = TrustedKeys.load(Path(trust)) if trust is not None else None
        self._on_event = on_event
        self._last_error: Exception | None = None
        self._failure: Failure | None = None
        self._events: deque[ClientEvent] = deque()
        self._retired: list[LentVersion] = []  # touched by whoever holds _loading
        self._loading = threading.Lock()  # held by whoever loads: a version is never loaded twice at a time
        self._wake = threading.Event()
        self._is_closed = False
        self._background = BackgroundThread("dynlora-load")
        try:
            self._live = self._load_first()
        except BaseException:
            self._background.stop()
            raise
        self._deliver_events()
        self._thread = threading.Thread(
            target=self._follow, args=(poll_seconds,), name="dynlora-client", daemon=True
        )
        self._thread.start()

    @property
    def version(self) -> int:
        """The number of the live version."""
        return self._live.loaded.version

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes of the live version."""
        return self._live.loaded.class_names

    @property
    def last_error(self) -> Exception | None:
        """Why the version that `current` leads to is not the one that answers; None while it is."""
        return self._last_error

    def classify(
        self,
        images: Sequence[ImageSource],
        labels: Sequence[str] | None = None,
        *,
        top: int = DEFAULT_TOP,
        unknown: bool = False,
    ) -> list[Classification]:
        """Return the likeliest labels of each picture (a path, bytes, or a Pillow image).

        However many pictures there are, a few are in memory at a time, and one version answers them all.

        Args:
            labels: what to choose from; by default all classes that the live version knows.
            top: how many to return at most.
            unknown: say for each picture, too, how unlike all labels it is.

        Raises:
            ImageError: a picture cannot be used; says which.
            ClientError: there is nothing to choose from, ``unknown`` has nothing left to compare with (the
                labels name all of deploy.unknown.BACKGROUND), a list is none, or the client is closed.
        """
        with self.hold() as loaded:
            embeddings = loaded.encode_images(images)
            answers = loaded.rank(embeddings, labels, top=top)
            unlike = loaded.unknown(embeddings, labels) if unknown else [None] * len(answers)
            return [
                Classification(loaded.version, tuple(predictions), score)
                for predictions, score in zip(answers, unlike, strict=True)
            ]

    def classify_stream(
        self,
        images: Iterable[ImageSource],
        labels: Sequence[str] | None = None,
        *,
        top: int = DEFAULT_TOP,
        unknown: bool = False,
        batch_size: int = STREAM_BATCH,
    ) -> Iterator[StreamAnswer]:
        """Yield an answer for each picture of an iterable that may be endless, in order, in bounded memory.

        Pictures are decoded while others are classified. A new version may answer from any batch on. A
        picture that cannot be used is answered with its error. The iterable is read in a thread of its own.

        Args:
            labels, top, unknown: as for ``classify``.
            batch_size: pictures that go through the model together, if so many have arrived.

        Raises:
            ClientError: at once where ``images`` is a single picture or ``labels`` a single text; with the
                first answer where there is nothing to choose from, ``unknown`` has nothing left to compare
                with, or the client is closed.
            Exception: what the iterable raised, after the answers to what came before.
        """
        if batch_size < 1:
            raise ClientError(f"batch_size must be at least 1, found {batch_size}")
        expect_list(images, "pictures")
        expect_list(labels, "labels")
        return answer_stream(
            self.hold, images, Question(labels, top, unknown), batch_size=min(batch_size, MAX_BATCH)
        )

    def encode_images(self, images: Sequence[ImageSource]) -> Embeddings:
        """Return the embeddings of N pictures.

        Raises:
            ImageError: a picture cannot be used; says which.
            ClientError: the client is closed.
        """
        with self.hold() as loaded:
            return Embeddings(loaded.version, loaded.encode_images(images))

    def encode_texts(self, texts: Sequence[str]) -> Embeddings:
        """Return the embeddings of N texts.

        Raises:
            ClientError: the client is closed.
        """
        with self.hold() as loaded:
            return Embeddings(loaded.version, loaded.encode_texts(texts))

    @contextlib.contextmanager
    def hold(self) -> Iterator[LoadedVersion]:
        """Lend the live version for several calls that belong together; it stays loaded until the end.

        Raises:
            ClientError: the client is closed.
        """
        lent = self._borrow()
        try:
            yield lent.loaded
        finally:
            if lent.give_back() and lent is not self._live:
                self._wake.set()  # the background thread frees it, not this request

    def _borrow(self) -> LentVersion:
        """The live version, with this request counted among its users."""
        while not self._is_closed:
            lent = self._live
            if lent.borrow():
                return lent  # else it was replaced and closed in between: look again
        raise ClientError("this client is closed; open a new one")

    def refresh(self) -> int:
        """Follow `current` now instead of at the next poll; return the number of the live version.

        Does not raise where the new version cannot be used: see ``last_error``.
        """
        self._look()
        return self.version

    def close(self) -> None:
        """Wait for requests that are running, then free everything. Not from within ``hold``."""
        self._is_closed = True  # whoever has not borrowed yet is refused
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        with self._loading:
            for lent in [*self._retired, self._live]:
                lent.close_when_idle()
            self._retired.clear()
        self._background.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load_first(self) -> LentVersion:
        for attempt in range(1, _FIRST_LOAD_ATTEMPTS + 1):
            target = resolve_current(self._serving_dir)
            try:
                return self._load(target, before=None)
            except (DeployError, OSError):
                if attempt == _FIRST_LOAD_ATTEMPTS or resolve_current(self._serving_dir) == target:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _follow(self, poll_seconds: float) -> None:
        """Run in the background thread until the client is closed."""
        while not self._is_closed:
            self._wake.wait(poll_seconds)
            self._wake.clear()
            self._look()

    def _look(self) -> None:
        """Free what is no longer used, then follow `current`; one thread at a time."""
        with self._loading:
            self._release_retired()
            if not self._is_closed:
                self._follow_current()
                self._release_retired()
        self._deliver_events()

    def _follow_current(self) -> None:
        """Bring the version that `current` leads to into service, if it is another one and sound."""
        target: Target | None = None
        state: object = None
        try:
            target = resolve_current(self._serving_dir)
            if target == self._live.target:
                self._failure = self._last_error = None
                return
            # Taken before loading: a repair while it loads makes another state, and another attempt.
            state = (target, state_of(target.directory))
            if self._failure and self._failure.covers(state, time.monotonic()):
                return
            self._switch(self._load(target, before=self._live.loaded))
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the new one, the old one answers
            self._reject(error, target, state or str(error))

    def _load(self, target: Target, *, before: LoadedVersion | None) -> LentVersion:
        """Load, check and warm a version; nobody waits for it but the first time.

        Args:
            before: the version that answers now; what it was asked lately is what is warmed up.
        """
        started = time.monotonic()
        aside = self._background.run
        loaded = LoadedVersion(target.directory, threads=self._threads, trust=self._trust, aside=aside)
        try:
            parity = aside(loaded.check_parity)
            if before is not None:
                aside(lambda: _warm_up(loaded, before))
            # A picture alone comes last, at full priority: the first request finds the weights in the caches.
            loaded.warm_up()
        except BaseException:
            loaded.close()
            raise
        detail = f"its embeddings differ from torch's by {parity:.2g}"
        self._events.append(ClientEvent("loaded", loaded.version, detail, time.monotonic() - started))
        return LentVersion(loaded, target)

    def _switch(self, lent: LentVersion) -> None:
        before, self._live = self._live, lent  # nobody waits, and this waits for nobody
        self._retired.append(before)
        self._failure = self._last_error = None

    def _release_retired(self) -> None:
        for lent in list(self._retired):
            started = time.monotonic()
            if not lent.close_if_idle():
                continue
            self._retired.remove(lent)
            self._background.run(return_memory)  # or the next version would come on top of it
            detail = "its last request is answered"
            seconds = time.monotonic() - started
            self._events.append(ClientEvent("released", lent.loaded.version, detail, seconds))

    def _reject(self, error: Exception, target: Target | None, state: object) -> None:
        """Remember what is wrong, and report it unless it is what was reported last."""
        is_news = self._failure is None or self._failure.state != state
        self._failure = Failure.of(error, state, self._failure, time.monotonic())
        self._last_error = error
        if is_news:
            name = target.directory.name if target else ""
            version = int(name) if name.isdecimal() else None
            self._events.append(ClientEvent("rejected", version, str(error) or type(error).__name__))

    def _deliver_events(self) -> None:
        """Log and pass on what happened; called without locks, so that a callback may call the client."""
        while True:
            try:
                event = self._events.popleft()
            except IndexError:
                return
            level = logging.WARNING if event.kind == "rejected" else logging.INFO
            _log.log(level, "version %s %s: %s", event.version, event.kind, event.detail)
            if self._on_event:
                try:
                    self._on_event(event)
                except Exception:  # noqa: BLE001 - other people's code must not end the thread
                    _log.exception("on_event failed; the client goes on")


def _warm_up(loaded: LoadedVersion, before: LoadedVersion) -> None:
    """Let a new version do once what the version before it was asked lately, a picture alone apart."""
    sizes = [size for size in before.remembered_batch_sizes() if size != 1]
    loaded.warm_up(sizes, before.remembered_labels(), background=before.knows_background)
