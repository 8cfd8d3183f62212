"""A store's copy in an object store or a folder, for machines that only read.

    <url>/versions/12/…      a version's files first, then its signature and manifest
    <url>/current.json       last: a reader never sees half a version

What lies there is a function of the store here: of every version what it still has, the weights of the
initial one and of as many more as asked for. Weights can be folded anywhere, so deltas are what matters.
Interrupted, the next run does what is left. Versions never change, so a file of the right size is the
right one; `check` reads everything there again and compares hashes.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from deploy import atomic, disk
from deploy.errors import ShareError
from deploy.manifest import DELTA_NAME, MANIFEST_NAME, SIGNATURE_NAME, WEIGHTS_NAME, Manifest, file_record
from deploy.remote import PIECE_BYTES, POINTER_NAME, Pointer, folder_of, open_file_system, store_errors
from deploy.store_reader import VERSIONS_NAME, StoreReader

# Once a version is gone from here, its history stays there: others are folded through it.
_FOREVER = frozenset({MANIFEST_NAME, SIGNATURE_NAME, DELTA_NAME})


@dataclass(frozen=True)
class MirrorReport:
    """What one run did; ``checked`` files were read again and found right."""

    version: int
    uploaded: int
    uploaded_bytes: int
    removed: int
    checked: int
    seconds: float


class Target(Protocol):
    """Where a mirror lies. Names are relative, with `/` between their parts."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Return {file name: bytes} of a folder; nothing where there is none."""

    def read(self, name: str) -> Iterator[bytes]:
        """Yield a file's content. Raises FileNotFoundError."""

    def put(self, name: str, content: bytes | Path) -> None:
        """Write a file so that readers see it whole or not at all."""

    def remove(self, name: str) -> None:
        """Remove a file."""


class FolderTarget:
    """A folder on a mounted file system, written durably."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def sizes(self, folder: str) -> dict[str, int]:
        """See Target."""
        path = self._folder / folder
        if not path.is_dir():
            return {}
        for leftover in list(path.glob(f"{atomic.TEMPORARY_PREFIX}*")):
            disk.unlink(leftover, missing_ok=True)
        return {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}

    def read(self, name: str) -> Iterator[bytes]:
        """See Target."""
        with (self._folder / name).open("rb") as file:
            yield from _pieces(file)

    def put(self, name: str, content: bytes | Path) -> None:
        """See Target."""
        path = self._folder / name
        atomic.make_dir(path.parent)
        if isinstance(content, bytes):
            atomic.write_file(path, content)
            return
        with content.open("rb") as file:
            atomic.write_file(path, _pieces(file), size_bytes=content.stat().st_size)

    def remove(self, name: str) -> None:
        """See Target."""
        atomic.remove_file(self._folder / name)


class StoreTarget:
    """An object store through fsspec. An object appears when its upload is complete."""

    def __init__(self, url: str) -> None:
        self._files, self._root = open_file_system(url)

    def sizes(self, folder: str) -> dict[str, int]:
        """See Target."""
        with store_errors(folder):
            try:
                entries = self._files.ls(f"{self._root}/{folder}", detail=True)
            except FileNotFoundError:
                return {}
            found = {entry["name"].rsplit("/", 1)[-1]: entry for entry in entries if entry["type"] == "file"}
            return {name: int(entry["size"]) for name, entry in found.items()}

    def read(self, name: str) -> Iterator[bytes]:
        """See Target."""
        with store_errors(name), self._files.open(f"{self._root}/{name}", "rb") as file:
            yield from _pieces(file)

    def put(self, name: str, content: bytes | Path) -> None:
        """See Target."""
        path = f"{self._root}/{name}"
        with store_errors(name):
            self._files.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            if isinstance(content, bytes):
                self._files.pipe_file(path, content)
            else:
                self._files.put_file(str(content), path)

    def remove(self, name: str) -> None:
        """See Target."""
        with store_errors(name):
            self._files.rm_file(f"{self._root}/{name}")


def open_target(address: str) -> Target:
    """Return the target of a path or URL.

    Raises:
        ShareError: it is a web address, which cannot be written to, or a package is missing.
    """
    scheme = address.split("://", 1)[0].lower() if "://" in address else ""
    if scheme in {"http", "https"}:
        raise ShareError(f"{address} cannot be written to: give a folder, or an object store such as s3://…")
    if scheme in {"", "file"}:
        return FolderTarget(folder_of(address).absolute())
    return StoreTarget(address)


def wanted_files(
    manifests: Mapping[int, Manifest], here: Mapping[int, frozenset[str]], *, live: int, full: int
) -> dict[int, tuple[str, ...]]:
    """Return {version: its files that belong in the mirror}, in the order they are written. Pure.

    Args:
        here: {version: names of the files it still has}.
        full: how many versions keep their weights there, the live one first, the initial one apart.
    """
    newest = sorted((number for number in here if WEIGHTS_NAME in here[number]), reverse=True)
    with_weights = set([live, *(number for number in newest if number != live)][:full])
    wanted = {}
    for number, manifest in manifests.items():
        keeps = manifest.kind == "initial" or number in with_weights
        names = [
            name
            for name in sorted(manifest.files)
            if name in here[number] and (keeps or name != WEIGHTS_NAME)
        ]
        signature = [SIGNATURE_NAME] if SIGNATURE_NAME in here[number] else []
        wanted[number] = (*names, *signature, MANIFEST_NAME)
    return wanted


def mirror(store: StoreReader, target: Target, *, full: int = 0, check: bool = False) -> MirrorReport:
    """Make a mirror equal to the store.

    Args:
        full: how many versions keep their weights there, beside the initial one.
        check: read every file there again.

    Raises:
        ShareError: another store is mirrored there, or a file here or there is not what its manifest says.
        OSError: the target cannot be reached or written.
    """
    started = time.monotonic()
    live = store.current()
    manifests = {number: store.manifest(number) for number in store.versions()}
    here = {
        number: frozenset(path.name for path in store.path(number).iterdir() if path.is_file())
        for number in manifests
    }
    work = _Work(store, target, should_check=check)
    wanted = wanted_files(manifests, here, live=live, full=full)
    for number in wanted:
        work.check_is_same(number)
    for number in sorted(wanted):
        work.bring(number, manifests[number], wanted[number])
    work.point(live)
    for number in sorted(wanted):
        work.tidy(number, wanted[number])
    return MirrorReport(
        live, work.uploaded, work.uploaded_bytes, work.removed, work.checked, time.monotonic() - started
    )


class _Work:
    """One run."""

    def __init__(self, store: StoreReader, target: Target, *, should_check: bool) -> None:
        self._store, self._target, self._should_check = store, target, should_check
        self._there: dict[int, dict[str, int]] = {}
        self.uploaded = self.uploaded_bytes = self.removed = self.checked = 0

    def check_is_same(self, number: int) -> None:
        """Refuse to write over another store's mirror, or over versions that this one no longer knows.

        A store that was restored from a copy gives their numbers away again.
        """
        name = f"{VERSIONS_NAME}/{number}/{MANIFEST_NAME}"
        try:
            found = b"".join(self._target.read(name))
        except FileNotFoundError:
            return
        if found != (self._store.path(number) / MANIFEST_NAME).read_bytes():
            raise ShareError(
                f"{name} there is another store's: nothing was written. Give another address, "
                "or empty that one."
            )

    def bring(self, number: int, manifest: Manifest, names: tuple[str, ...]) -> None:
        """Write what is missing of a version."""
        folder = f"{VERSIONS_NAME}/{number}"
        there = self._there[number] = self._target.sizes(folder)
        for name in names:
            path, record = self._store.path(number) / name, manifest.files.get(name)
            content: bytes | Path = path
            if record is None:  # manifest and signature: small, and a version may be signed again
                content = path.read_bytes()
                if there.get(name) == len(content) and self._sha256(folder, name) == _sha256(content):
                    continue
            elif there.get(name) == record.bytes and self._is_right(folder, name, record.sha256):
                continue
            elif file_record(path) != record:
                raise ShareError(
                    f"{path} is not what its manifest records, so it is not mirrored: verify the store"
                )
            self._target.put(f"{folder}/{name}", content)
            self.uploaded += 1
            self.uploaded_bytes += len(content) if isinstance(content, bytes) else path.stat().st_size
            there.pop(name, None)
        if any(name not in there for name in names):
            self._confirm(folder, manifest, names)

    def _confirm(self, folder: str, manifest: Manifest, names: tuple[str, ...]) -> None:
        """Compare the sizes that arrived with those that were sent."""
        found = self._target.sizes(folder)
        for name in names:
            record = manifest.files.get(name)
            if name not in found or (record is not None and found[name] != record.bytes):
                raise ShareError(f"{folder}/{name} did not arrive whole; mirror again")

    def point(self, live: int) -> None:
        """Say which version is live, unless it is said already."""
        content = (self._store.path(live) / MANIFEST_NAME).read_bytes()
        pointer = (
            Pointer(version=live, manifest_sha256=_sha256(content)).model_dump_json(by_alias=True).encode()
        )
        try:
            if b"".join(self._target.read(POINTER_NAME)) == pointer:
                return
        except FileNotFoundError:
            pass
        self._target.put(POINTER_NAME, pointer)
        self.uploaded += 1
        self.uploaded_bytes += len(pointer)

    def tidy(self, number: int, names: tuple[str, ...]) -> None:
        """Remove what no longer belongs there; history stays."""
        for name in sorted(self._there[number].keys() - set(names) - _FOREVER):
            self._target.remove(f"{VERSIONS_NAME}/{number}/{name}")
            self.removed += 1

    def _is_right(self, folder: str, name: str, sha256: str) -> bool:
        """Tell whether a file of the right size is the right one; looked into only if that was asked for."""
        if not self._should_check:
            return True
        self.checked += 1
        return self._sha256(folder, name) == sha256

    def _sha256(self, folder: str, name: str) -> str:
        digest = hashlib.sha256()
        for piece in self._target.read(f"{folder}/{name}"):
            digest.update(piece)
        return digest.hexdigest()


def _pieces(file: Any) -> Iterator[bytes]:
    while piece := file.read(PIECE_BYTES):
        yield piece


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
