"""After each change of the live version, or of a signature: mirror it, give it to Triton.

In a thread, so that nothing waits.

Everything here is copying, in steps that may be cut short and repeated: at the start of the daemon it is done
once, whatever was done before, and the thread dies with the process. Trouble is told and tried again.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

from daemon.config import Config
from deploy.errors import DeployError, ShareError
from deploy.manifest import SIGNATURE_NAME
from deploy.store_reader import StoreReader

Tell = Callable[..., None]
Signatures = frozenset[tuple[int, int, int]]  # version, inode and time of each: another is another file
_SIGNATURES_SECONDS = 1.0  # between two looks at them: there may be thousands


def signer(config: Config) -> Callable[[Path], None] | None:
    """What signs a version's directory; None where versions are not signed.

    Raises:
        SignatureError: the key cannot be used.
    """
    if not config.signing.key:
        return None
    from deploy.signing import SigningKey

    return SigningKey.load(Path(config.signing.key)).sign_version


class Sharing:
    """Keeps mirror and Triton at the live version.

    Args:
        tell: called with an event's name and fields, from `tick`.
    """

    def __init__(self, serving_dir: Path, config: Config, tell: Tell) -> None:
        self._serving_dir, self._config, self._tell = serving_dir, config, tell
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._events: list[tuple[str, dict[str, object]]] = []
        self._wanted: tuple[int, Signatures] | None = None
        self._done: tuple[int, Signatures] | None = None
        self._signatures: Signatures = frozenset()
        self._look_at = 0.0

    def is_done(self) -> bool:
        """Whether the live version is everywhere it should be, and with it what was signed since."""
        if not (self._config.mirror.url or self._config.triton.repository):
            return True
        try:
            return self._thread is None and self._done == self._state()
        except DeployError:
            return True  # nothing is live, so nothing is to be shared

    def tick(self) -> bool:
        """Start, or see how far it is; returns whether something ended.

        Raises:
            ShareError, StoreError, OSError: the last run failed; the next call tries again.
        """
        if self._thread is not None:
            if self._thread.is_alive():
                return False
            self._finish()
            return True
        if not self.is_done():
            self._wanted = self._state()
            self._thread = threading.Thread(target=self._run, name="dynlora-sharing", daemon=True)
            self._thread.start()
        return False

    def _state(self) -> tuple[int, Signatures]:
        """What is to be shared: the live version's number, and which signatures there are.

        Raises:
            StoreError: nothing is live.
        """
        store = StoreReader(self._serving_dir)
        live = store.current()
        if self._config.mirror.url and time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + _SIGNATURES_SECONDS
            with contextlib.suppress(OSError):  # no more files can be opened, say: the next look will tell
                self._signatures = _signatures_in(store)
        return live, self._signatures

    def _finish(self) -> None:
        self._thread = None
        events, self._events = self._events, []
        for name, fields in events:
            self._tell(name, **fields)
        error, self._error = self._error, None
        if error is not None:
            raise error
        self._done = self._wanted

    def _run(self) -> None:
        """In the thread: both, even if the first one fails."""
        for step in (self._to_triton, self._to_mirror):
            try:
                step()
            except (DeployError, OSError) as error:
                self._error = self._error or error
            except Exception as error:  # noqa: BLE001 - a library's own error must not end sharing in silence
                self._error = self._error or ShareError(f"sharing failed: {error!r}")

    def _to_triton(self) -> None:
        settings = self._config.triton
        if settings.repository:
            from deploy.triton_control import sync

            store, folder = StoreReader(self._serving_dir), Path(settings.repository)
            report = sync(store, folder, prefix=settings.prefix, server=settings.server)
            if report.added or report.removed:
                self._events.append(("triton", {"live": report.live, "served": list(report.served)}))

    def _to_mirror(self) -> None:
        settings = self._config.mirror
        if settings.url:
            from deploy.mirror import mirror, open_target

            report = mirror(StoreReader(self._serving_dir), open_target(settings.url), full=settings.full)
            if report.uploaded or report.removed:
                self._events.append(("mirrored", {"live": report.version, "bytes": report.uploaded_bytes}))


def _signatures_in(store: StoreReader) -> Signatures:
    found = set()
    for number in store.versions():
        with contextlib.suppress(FileNotFoundError):
            state = (store.path(number) / SIGNATURE_NAME).stat()
            found.add((number, state.st_ino, state.st_mtime_ns))
    return frozenset(found)
