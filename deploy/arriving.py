"""What a remote has, checked as it comes: the live version's manifest, its ancestors', and their signatures.

Everything here is small. Nothing is written, and nothing is believed that a trusted key, the pointer's
hash, or what is here already does not vouch for.
"""

import contextlib
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from deploy.errors import ShareError, SignatureError
from deploy.fetch import PART_SUFFIX, Fetcher
from deploy.manifest import (
    MANIFEST_NAME,
    REQUIRED_NAMES,
    SIGNATURE_NAME,
    UNLISTED_NAMES,
    WEIGHTS_NAME,
    Manifest,
    parse_manifest,
)
from deploy.remote import read_pointer
from deploy.signing import MAX_SIGNATURE_BYTES, TrustedKeys
from deploy.store_reader import CURRENT_NAME, VERSIONS_NAME, StoreReader

_MAX_MANIFEST_BYTES = 16 << 20
_MAX_SMALL_BYTES = 1 << 30  # any file but the weights: the embeddings of half a million classes
_MAX_ANCESTORS = 100_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Arriving:
    """A version of the remote: its manifest, the bytes of it that were vouched for, and its signature."""

    manifest: Manifest
    content: bytes
    signature: bytes

    @property
    def weights_bytes(self) -> int:
        """Size of the weights file."""
        return self.manifest.files[WEIGHTS_NAME].bytes


class Catalogue:
    """The versions of one remote, beside those of one store here.

    Args:
        trust: keys, one of which must have signed every version; None: signatures are only passed on.
        max_bytes: the largest weights file that is accepted.
    """

    def __init__(
        self, fetcher: Fetcher, store: StoreReader, *, trust: TrustedKeys | None, max_bytes: int
    ) -> None:
        self._fetch, self._store = fetcher, store
        self._trust, self._max_bytes = trust, max_bytes
        self._arrived: dict[int, Arriving] = {}

    def head(self) -> Arriving:
        """Return the version that is live in the remote.

        Raises:
            ShareError, SignatureError, ManifestError, OSError: as deploy.pull.pull.
        """
        pointer = read_pointer(self._fetch.remote)
        if pointer is None:
            head = self._arriving(CURRENT_NAME)
            self._check_is_same(head)
            return head
        here = self._here(pointer.version)
        if here is not None and hashlib.sha256(here.content).hexdigest() == pointer.manifest_sha256:
            return here
        folder = f"{VERSIONS_NAME}/{pointer.version}"
        head = self._arriving(folder)
        found = hashlib.sha256(head.content).hexdigest()
        if head.manifest.version != pointer.version or found != pointer.manifest_sha256:
            raise ShareError(
                f"{folder}/{MANIFEST_NAME} there is not the one that is live: expected version "
                f"{pointer.version} with sha256 {pointer.manifest_sha256}, found version "
                f"{head.manifest.version} with {found}. Try again, or mirror it again."
            )
        self._check_is_same(head)
        return head

    def history(self, head: Arriving) -> dict[int, Manifest]:
        """Return manifests by number: the version, and its ancestors up to version 0.

        Raises:
            ShareError: it does not end at an initial version, or that is another one than here.
        """
        self._arrived[head.manifest.version] = head
        self._check_is_same(head)
        known = {head.manifest.version: head.manifest}
        manifest = head.manifest
        while manifest.parent is not None:
            if len(known) > _MAX_ANCESTORS:
                raise ShareError(f"version {head.manifest.version} there has too many ancestors")
            manifest = self.known(manifest.parent).manifest
            known[manifest.version] = manifest
        if not known[min(known)].kind == "initial" or manifest.lineage:
            raise ShareError(
                f"the history there begins with version {manifest.version}, which is not an initial one"
            )
        self._check_is_same(self._arriving(f"{VERSIONS_NAME}/{manifest.version}"))
        return known

    def known(self, number: int) -> Arriving:
        """Return a version from here where it is here, else from the remote."""
        if number not in self._arrived:
            self._arrived[number] = self._here(number) or self._arriving(f"{VERSIONS_NAME}/{number}")
            found = self._arrived[number].manifest.version
            if found != number:
                raise ShareError(f"{VERSIONS_NAME}/{number} holds the manifest of version {found}")
        return self._arrived[number]

    def _here(self, number: int) -> Arriving | None:
        """Return a version that is in the store here, with the signature that is needed; None otherwise."""
        directory = self._store.path(number)
        content = signature = b""
        with contextlib.suppress(FileNotFoundError):
            content = (directory / MANIFEST_NAME).read_bytes()
            signature = (directory / SIGNATURE_NAME).read_bytes()
        if not content or (self._trust is not None and not signature):
            return None
        try:
            return self._checked(content, signature, directory)
        except SignatureError:
            return None  # the keys have changed: what is there may be signed with the new one

    def _arriving(self, folder: str) -> Arriving:
        """Fetch manifest and signature of a version."""
        try:
            content = self._fetch.small(f"{folder}/{MANIFEST_NAME}", _MAX_MANIFEST_BYTES)
        except FileNotFoundError as error:
            raise ShareError(
                f"{folder}/{MANIFEST_NAME} is not there: expected a mirror, or a serving directory with a "
                "live version. Check the address."
            ) from error
        except PermissionError as error:
            raise ShareError(
                f"{folder}/{MANIFEST_NAME} is not there, or may not be read ({error.strerror}): expected a "
                "mirror, or a serving directory with a live version. Check the address, and what it lets "
                "this machine read."
            ) from error
        return self._checked(content, self._signature(folder), Path(folder))

    def _signature(self, folder: str) -> bytes:
        """Fetch a version's signature; b"" where there is none.

        S3 without the right to list, and CloudFront before it, say of a missing file that it is forbidden.

        Raises:
            ShareError: it is forbidden, and signatures are insisted on.
        """
        name = f"{folder}/{SIGNATURE_NAME}"
        try:
            return self._fetch.small(name, MAX_SIGNATURE_BYTES)
        except FileNotFoundError:
            return b""
        except PermissionError as error:
            if self._trust is None:
                return b""
            raise ShareError(
                f"{name} is not there, or may not be read ({error.strerror}): expected a signature of a "
                "trusted key. Sign it where it was made (`dynlora sign`), or let it be read from here."
            ) from error

    def _checked(self, content: bytes, signature: bytes, place: Path) -> Arriving:
        if self._trust is not None:
            manifest = self._trust.check(content, signature, place)
        else:
            manifest = parse_manifest(content, place / MANIFEST_NAME)
        _check_names_and_sizes(manifest, max_bytes=self._max_bytes)
        return Arriving(manifest, content, signature)

    def _check_is_same(self, arriving: Arriving) -> None:
        """Check that a version here of that number is that version.

        Raises:
            ShareError: it is another one.
        """
        path = self._store.path(arriving.manifest.version) / MANIFEST_NAME
        if path.is_file() and path.read_bytes() != arriving.content:
            raise ShareError(
                f"version {arriving.manifest.version} there is another one than {path.parent}: the store "
                "there was made anew, or is another one. Pull it into an empty directory."
            )


def _check_names_and_sizes(manifest: Manifest, *, max_bytes: int) -> None:
    """Check what a manifest of a stranger would have us write.

    Raises:
        ShareError: a name that is no plain file name, a file that is missing, or too large.
    """
    missing = sorted(set(REQUIRED_NAMES) - manifest.files.keys())
    if missing:
        raise ShareError(f"the manifest of version {manifest.version} lacks {', '.join(missing)}")
    for name, record in manifest.files.items():
        if not _NAME.fullmatch(name) or name in UNLISTED_NAMES or name.endswith(PART_SUFFIX):
            raise ShareError(
                f"version {manifest.version} there lists {name!r}, which is no name for a file of it"
            )
        limit = max_bytes if name == WEIGHTS_NAME else min(_MAX_SMALL_BYTES, max_bytes)
        if record.bytes > limit:
            raise ShareError(
                f"version {manifest.version} there has a {name} of {record.bytes} bytes; "
                f"at most {limit} are taken"
            )
