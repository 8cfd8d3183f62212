"""sha256 beside other work: hashing lets go of Python's lock, so in a thread of its own it costs no time."""

import hashlib
import queue
import threading
from types import TracebackType
from typing import Self

_PIECES_AHEAD = 2  # bounds what is kept in memory for a hash that is slower than the disk


class BackgroundHash:
    """A sha256 that is computed in a thread. The pieces must not change before the digest is taken.

    Use it as a context manager: the thread is gone at the end, whatever happened in between.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pieces: queue.Queue[bytes | memoryview | None] = queue.Queue(_PIECES_AHEAD)
        self._thread = threading.Thread(target=self._run, name="hash", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()

    def update(self, piece: bytes | memoryview) -> None:
        """Hash one more piece; waits while too many are ahead."""
        self._pieces.put(piece)

    def hexdigest(self) -> str:
        """Wait for all pieces and return the digest; nothing can be added after it."""
        self._finish()
        return self._digest.hexdigest()

    def _finish(self) -> None:
        if self._thread.is_alive():
            self._pieces.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            self._digest.update(piece)
