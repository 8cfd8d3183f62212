"""An edge machine's copy of a version store: deltas come over the wire, weights are folded here.

    pointer → manifest → (W0 once) → deltas → fold → sha256 = the manifest's? → verify → current

What the remote says is believed only as far as a hash, or a trusted key, vouches for it. The result is a
store that deploy.client follows: `current` changes by one rename, to a version that was run here.
A process killed at any moment leaves the old version live, and the next one goes on with what is there.

Kept here: version 0 (reverts are folded from it), the live and the previous version whole; of others the
manifest and the delta. One process at a time, by a lock; a store that dynlora publishes into is refused.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from deploy import atomic, disk
from deploy.arriving import Arriving, Catalogue
from deploy.errors import ShareError, StoreError
from deploy.fetch import Fetcher
from deploy.installing import Installed, Installer
from deploy.manifest import SIGNATURE_NAME, Manifest
from deploy.prune import prune_version
from deploy.remote import Remote
from deploy.signing import TrustedKeys
from deploy.store_reader import CURRENT_NAME, VERSIONS_NAME, StoreReader

MARKER_NAME = "pulled.json"
_LOCK_NAME = ".pull.lock"
MAX_BYTES = 20 << 30


class Marker(BaseModel):
    """pulled.json: this store is a copy that pull keeps; ``previous`` was live before the live version."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_number: int = 1
    previous: int | None = None


@dataclass(frozen=True)
class PullOptions:
    """What an edge machine insists on.

    Attributes:
        trust: keys, one of which must have signed every version.
        forward_only: refuse an older version than the live one, also where the sender rolled back.
        max_bytes: the largest weights file that is accepted.
        check: read every file of the live version again, and repair what is damaged.
    """

    trust: TrustedKeys | None = None
    forward_only: bool = False
    max_bytes: int = MAX_BYTES
    check: bool = False


@dataclass(frozen=True)
class PullReport:
    """What one pull did.

    ``bytes_moved`` counts the content of files; ``weights_bytes`` is what the weights alone would have been.
    ``checked`` files of the version were here already and were read again; ``repaired`` names those that
    were damaged, and were fetched or folded anew.
    """

    version: int
    before: int | None
    is_new: bool
    bytes_moved: int
    weights_bytes: int
    deltas_folded: int
    seconds: float
    checked: int = 0
    repaired: tuple[str, ...] = ()


def pull(remote: Remote, directory: Path, options: PullOptions = PullOptions()) -> PullReport:
    """Bring a store to the version that is live in the remote.

    Raises:
        ShareError: the remote holds what it must not, or ``directory`` is no copy that pull keeps.
        SignatureError: a version is not signed by a trusted key.
        VerifyError: a version arrived whole, but does not run here as it should.
        DeltaError, ManifestError, WeightsError: what came over is malformed.
        OSError: the remote cannot be reached, or the disk is full. In each case the live version stays.
    """
    started = time.monotonic()
    with _locked(directory):
        store = StoreReader(directory)
        marker = _prepare(store)
        before = _live(store)
        fetcher = Fetcher(remote)
        catalogue = Catalogue(fetcher, store, trust=options.trust, max_bytes=options.max_bytes)
        installer = Installer(fetcher, store, catalogue)
        head = catalogue.head()
        is_new = before != head.manifest.version or not store.is_full(before)
        if options.forward_only and before is not None and head.manifest.version < before:
            raise ShareError(
                f"version {head.manifest.version} is live there, version {before} is live here, and only "
                "newer versions are to be taken (--forward-only)"
            )
        installed = installer.install(head) if is_new or options.check else Installed()
        _keep_signature(store, head, is_trusted=options.trust is not None)
        if is_new:
            marker = marker if before == head.manifest.version else Marker(previous=before)
            _write_marker(store, marker)
            atomic.replace_symlink(directory / CURRENT_NAME, f"{VERSIONS_NAME}/{head.manifest.version}")
        _prune(store, head, marker)
        installer.clean()
        return PullReport(
            version=head.manifest.version,
            before=before,
            is_new=is_new,
            bytes_moved=fetcher.bytes_moved,
            weights_bytes=head.weights_bytes,
            deltas_folded=installed.deltas_folded,
            seconds=time.monotonic() - started,
            checked=installed.checked,
            repaired=installed.repaired,
        )


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    atomic.make_dir(directory)
    descriptor = disk.open_file(directory / _LOCK_NAME, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ShareError(
                f"another process pulls into {directory} already; wait for it, or stop it"
            ) from error
        yield
    finally:
        os.close(descriptor)


def _prepare(store: StoreReader) -> Marker:
    """Make the directory a copy that pull keeps, unless it is something else.

    Raises:
        ShareError: it is a store of another origin.
    """
    path = store.serving_dir / MARKER_NAME
    try:
        return Marker.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        if store.versions() or (store.serving_dir / CURRENT_NAME).is_symlink():
            raise ShareError(
                f"{store.serving_dir} is a store that was not pulled: it has versions and no {MARKER_NAME}. "
                "Give an empty directory; pulling would mix two histories."
            ) from None
    except ValidationError as error:
        raise ShareError(
            f"{path} cannot be read: {error.errors()[0]['msg']}. Pull into an empty directory."
        ) from error
    atomic.make_dir(store.versions_dir)
    marker = Marker()
    _write_marker(store, marker)
    return marker


def _keep_signature(store: StoreReader, head: Arriving, *, is_trusted: bool) -> None:
    """A version that was here before it was signed, or signed with another key, gets its new signature."""
    path = store.path(head.manifest.version) / SIGNATURE_NAME
    if is_trusted and (not path.is_file() or path.read_bytes() != head.signature):
        atomic.write_file(path, head.signature, mode=0o444)


def _write_marker(store: StoreReader, marker: Marker) -> None:
    atomic.write_text(store.serving_dir / MARKER_NAME, marker.model_dump_json() + "\n")


def _live(store: StoreReader) -> int | None:
    """The version that is live here; None in a new copy, or where the link was damaged."""
    try:
        return store.current()
    except StoreError:
        return None


def _prune(store: StoreReader, head: Arriving, marker: Marker) -> None:
    """Thin what is neither live, nor was live before, nor initial; what a client has open waits."""
    stay = {head.manifest.version, marker.previous}
    for number in store.full_versions():
        if number not in stay and not _is_initial(store.manifest(number)):
            prune_version(store.path(number))


def _is_initial(manifest: Manifest) -> bool:
    return manifest.kind == "initial"
