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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from deploy.errors import ClientError, DeployError
from deploy.preprocess import ImageSource
from deploy.runtime import DEFAULT_TOP, LoadedVersion, Prediction
from deploy.signing import TrustedKeys
from deploy.target import Failure, Target, resolve_current, state_of

POLL_SECONDS = 0.25

_FIRST_LOAD_ATTEMPTS = 5  # the publisher may switch and prune while the first version loads

_log = logging.getLogger(__name__)

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Classification:
    """The likeliest labels of one picture, best first, and the version that said so."""

    version: int
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True)
class Embeddings:
    """L2-normalised embeddings, ``values`` (N, dim), and the version that computed them.

    Only embeddings of the same version may be compared. numpy.asarray(embeddings) gives the values.
    """

    version: int
    values: Float32

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:  # noqa: FBT001
        return np.array(self.values, dtype=dtype, copy=copy)


@dataclass(frozen=True)
class ClientEvent:
    """What the client did on its own; ``seconds`` is how long it took (0 where that says nothing).

    ``loaded``: a version became the live one. ``rejected``: `current` leads to a version that cannot
    be used (or nowhere); the old one goes on answering. ``released``: an old version was freed.
    """

    kind: Literal["loaded", "rejected", "released"]
    version: int | None
    detail: str
    seconds: float = 0.0


@dataclass(eq=False)
class _Slot:
    """A loaded version and how many requests are using it."""

    loaded: LoadedVersion
    target: Target
    users: int = 0


class Client:
    """Answers from the live version of a store; safe to use from many threads.

    Args:
        serving_dir: the store: the directory that holds `current` and `versions`.
        poll_seconds: how often to look at `current`.
        threads: ONNX Runtime threads per tower; by default the CPUs this process may run on.
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
        self._retired: list[_Slot] = []
        self._pointer = threading.Condition()  # guards _live, _retired, _is_closed and every users count
        self._loading = threading.Lock()  # held by whoever loads: a version is never loaded twice at a time
        self._wake = threading.Event()
        self._is_closed = False
        self._live = self._load_first()
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
        self, images: Sequence[ImageSource], labels: Sequence[str] | None = None, *, top: int = DEFAULT_TOP
    ) -> list[Classification]:
        """Return the likeliest labels of each picture (a path, bytes, or a Pillow image).

        Args:
            labels: what to choose from; by default all classes that the live version knows.
            top: how many to return at most.

        Raises:
            ImageError: a picture cannot be used; says which.
            ClientError: there is nothing to choose from, or the client is closed.
        """
        with self.hold() as loaded:
            answers = loaded.classify(images, labels, top=top)
            return [Classification(loaded.version, tuple(predictions)) for predictions in answers]

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
        with self._pointer:
            if self._is_closed:
                raise ClientError("this client is closed; open a new one")
            slot = self._live
            slot.users += 1
        try:
            yield slot.loaded
        finally:
            with self._pointer:
                slot.users -= 1
                if slot.users == 0:
                    self._pointer.notify_all()
                    if slot is not self._live:
                        self._wake.set()  # the background thread frees it, not this request

    def refresh(self) -> int:
        """Follow `current` now instead of at the next poll; return the number of the live version.

        Does not raise where the new version cannot be used: see ``last_error``.
        """
        self._look()
        return self.version

    def close(self) -> None:
        """Wait for requests that are running, then free everything. Not from within ``hold``."""
        with self._pointer:
            self._is_closed = True
            self._pointer.wait_for(lambda: not any(slot.users for slot in [self._live, *self._retired]))
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        with self._loading:
            self._release_retired()
            self._live.loaded.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load_first(self) -> _Slot:
        for attempt in range(1, _FIRST_LOAD_ATTEMPTS + 1):
            target = resolve_current(self._serving_dir)
            try:
                return self._load(target, remembered_labels=())
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
            self._switch(self._load(target, remembered_labels=self._live.loaded.remembered_labels()))
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the new one, the old one answers
            self._reject(error, target, state or str(error))

    def _load(self, target: Target, *, remembered_labels: Sequence[str]) -> _Slot:
        """Load, check and warm a version; nobody waits for it but the first time."""
        started = time.monotonic()
        loaded = LoadedVersion(target.directory, threads=self._threads, trust=self._trust)
        try:
            parity = loaded.check_parity()
            loaded.warm_up(labels=remembered_labels)
        except BaseException:
            loaded.close()
            raise
        detail = f"its embeddings differ from torch's by {parity:.2g}"
        self._events.append(ClientEvent("loaded", loaded.version, detail, time.monotonic() - started))
        return _Slot(loaded, target)

    def _switch(self, slot: _Slot) -> None:
        with self._pointer:
            self._retired.append(self._live)
            self._live = slot
        self._failure = self._last_error = None

    def _release_retired(self) -> None:
        with self._pointer:
            idle = [slot for slot in self._retired if slot.users == 0]
            self._retired = [slot for slot in self._retired if slot.users > 0]
        for slot in idle:
            started = time.monotonic()
            slot.loaded.close()
            detail = "its last request is answered"
            seconds = time.monotonic() - started
            self._events.append(ClientEvent("released", slot.loaded.version, detail, seconds))

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
