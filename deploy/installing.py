"""How a version that was made elsewhere gets into a store: fetched, folded, checked, then given its number.

A version arrives in `.staging-pull-<number>-<hash>`, and is renamed to its number when it is whole. An
ancestor arrives thin, as manifest and delta. One that is here thin and becomes live again is completed in
place, the weights last: until then it does not count as whole.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy import atomic, disk
from deploy.ancestry import delta_versions, nearest_base
from deploy.arriving import Arriving, Catalogue
from deploy.copying import copy_file
from deploy.delta import Delta, load_delta, write_folded
from deploy.errors import DeltaError, ShareError, StoreError, WeightsError
from deploy.fetch import PART_SUFFIX, Fetcher
from deploy.manifest import (
    DELTA_NAME,
    MANIFEST_NAME,
    SIGNATURE_NAME,
    WEIGHTS_NAME,
    FileRecord,
    Manifest,
    is_as_recorded,
)
from deploy.store_reader import VERSIONS_NAME, StoreReader
from deploy.verify import verify_version
from deploy.weights import read_weights

STAGING_PREFIX = ".staging-pull-"


@dataclass(frozen=True)
class Installed:
    """What it took to have a version whole.

    Attributes:
        checked: how many of its files were here already and were read again.
        repaired: names of those that were damaged, and were fetched or folded anew.
    """

    deltas_folded: int = 0
    checked: int = 0
    repaired: tuple[str, ...] = ()


class Installer:
    """Brings versions of a catalogue into the store. The caller holds the store's lock."""

    def __init__(self, fetcher: Fetcher, store: StoreReader, catalogue: Catalogue) -> None:
        self._fetch, self._store, self._catalogue = fetcher, store, catalogue

    def install(self, head: Arriving) -> Installed:
        """Have a version here, whole and checked; one that is here already is read again.

        Raises:
            As deploy.pull.pull.
        """
        known = self._catalogue.history(head)
        if not self._store.is_full(head.manifest.version):
            return Installed(self._bring(head, known))
        checked, damaged = len(head.manifest.files), self._damaged(head)
        return Installed(self._bring(head, known) if damaged else 0, checked, damaged)

    def _bring(self, head: Arriving, known: dict[int, Manifest]) -> int:
        """Bring a version in, or anew, with what it is folded from; return how many deltas that took."""
        number, initial = head.manifest.version, min(known)
        self._drop_stagings(but=map(self._catalogue.known, known))
        wanted = delta_versions(head.manifest.lineage, known)
        if number == initial or not self._store.is_full(initial):
            self._install_initial(self._catalogue.known(initial))
        for other in wanted:
            if other != number and not (self._store.path(other) / DELTA_NAME).is_file():
                self._install_thin(self._catalogue.known(other))
        staging = self._stage(head)
        self._gather(head, staging)
        folded = self._fold(head, staging, known, wanted)
        self._seal(head, staging)
        verify_version(staging)
        self._settle(staging, number)
        return folded

    def clean(self) -> None:
        """Remove what broken-off pulls left."""
        self._drop_stagings(but=())
        for directory in (self._store.serving_dir, self._store.versions_dir):
            for path in list(directory.glob(f"{atomic.TEMPORARY_PREFIX}*")):
                atomic.remove_tree(path)

    def _damaged(self, head: Arriving) -> tuple[str, ...]:
        """Read a version's files and return the names of those that are not as recorded."""
        directory, files = self._store.path(head.manifest.version), head.manifest.files
        return tuple(name for name in sorted(files) if not is_as_recorded(directory / name, files[name]))

    def _drop_stagings(self, *, but: Iterable[Arriving]) -> None:
        """Remove staging directories of versions that are not coming any more."""
        kept = {_staging_name(arriving) for arriving in but}
        for path in list(self._store.versions_dir.glob(f"{STAGING_PREFIX}*")):
            if path.name not in kept:
                atomic.remove_tree(path)

    def _install_initial(self, arriving: Arriving) -> None:
        """Bring in the version that all others are folded from, weights and all."""
        staging = self._stage(arriving)
        self._gather(arriving, staging)
        record = arriving.manifest.files[WEIGHTS_NAME]
        if not is_as_recorded(staging / WEIGHTS_NAME, record):
            self._fetch.file(self._remote_name(arriving, WEIGHTS_NAME), record, staging / WEIGHTS_NAME)
        self._seal(arriving, staging)
        self._settle(staging, arriving.manifest.version)

    def _install_thin(self, arriving: Arriving) -> None:
        """Bring in an ancestor's manifest and delta."""
        staging = self._stage(arriving)
        record = arriving.manifest.files[DELTA_NAME]
        self._obtain(arriving, DELTA_NAME, record, staging / DELTA_NAME)
        self._seal(arriving, staging)
        self._settle(staging, arriving.manifest.version)

    def _stage(self, arriving: Arriving) -> Path:
        staging = self._store.versions_dir / _staging_name(arriving)
        atomic.make_dir(staging)
        return staging

    def _gather(self, arriving: Arriving, staging: Path) -> None:
        """Put every file but the weights into a staging directory."""
        for name, record in sorted(arriving.manifest.files.items()):
            if name != WEIGHTS_NAME:
                self._obtain(arriving, name, record, staging / name)

    def _obtain(self, arriving: Arriving, name: str, record: FileRecord, target: Path) -> None:
        """Have a file in its place: it is there already, a version here has the same, or it is fetched."""
        if is_as_recorded(target, record):
            return
        disk.unlink(target, missing_ok=True)
        for source in self._same_here(name, record):
            copy_file(source, target)
            if is_as_recorded(target, record):
                return
            disk.unlink(target)  # it was damaged here
        self._fetch.file(self._remote_name(arriving, name), record, target)

    def _same_here(self, name: str, record: FileRecord) -> Iterator[Path]:
        """The files of versions here that ought to be the same."""
        for number in reversed(self._store.versions()):
            path = self._store.path(number) / name
            with contextlib.suppress(StoreError):
                if path.is_file() and self._store.manifest(number).files.get(name) == record:
                    yield path

    def _fold(self, head: Arriving, staging: Path, known: dict[int, Manifest], wanted: list[int]) -> int:
        """Write the weights from the nearest ones that are here; return how many deltas that took."""
        record = head.manifest.files[WEIGHTS_NAME]
        if is_as_recorded(staging / WEIGHTS_NAME, record):
            return 0
        whole = {
            number: manifest
            for number, manifest in known.items()
            if number != head.manifest.version and self._store.is_full(number)  # itself would be damaged
        }
        found, problem = None, None
        for base in dict.fromkeys((nearest_base(head.manifest, whole), min(known))):
            if base is None:
                continue
            deltas = self._deltas(head, staging, wanted[len(known[base].lineage) :])
            try:
                weights = read_weights(self._store.path(base) / WEIGHTS_NAME)
                found, problem = write_folded(staging / WEIGHTS_NAME, weights, deltas), None
            except (DeltaError, WeightsError) as error:  # the weights here may be damaged where it hurts
                problem = error
            if found == record:
                return len(deltas)
        atomic.remove_file(staging / WEIGHTS_NAME)
        self._drop_damaged_initial(min(known), known[min(known)].files[WEIGHTS_NAME])
        if problem is not None:
            raise problem
        raise ShareError(
            f"the weights folded for version {head.manifest.version} are not what its manifest records: "
            f"expected sha256 {record.sha256}, found {found.sha256 if found else 'nothing'}. "
            "The live version stays; verify the store they come from."
        )

    def _deltas(self, head: Arriving, staging: Path, numbers: Sequence[int]) -> list[Delta]:
        """Read the deltas that versions brought; one that was damaged here is fetched again."""
        deltas = []
        for number in numbers:
            if number == head.manifest.version:
                place = staging
            else:
                arriving, place = self._catalogue.known(number), self._store.path(number)
                if not is_as_recorded(place / DELTA_NAME, arriving.manifest.files[DELTA_NAME]):
                    self._install_thin(arriving)
            deltas.append(load_delta(place / DELTA_NAME))
        return deltas

    def _drop_damaged_initial(self, number: int, record: FileRecord) -> None:
        """Remove the weights that all others are folded from where they are damaged.

        Raises:
            ShareError: they are, and the next pull will fetch them anew.
        """
        path = self._store.path(number) / WEIGHTS_NAME
        if not is_as_recorded(path, record):
            atomic.remove_file(path)
            raise ShareError(f"{path} was damaged and has been removed: pull again, which fetches it anew")

    def _remote_name(self, arriving: Arriving, name: str) -> str:
        return f"{VERSIONS_NAME}/{arriving.manifest.version}/{name}"

    def _seal(self, arriving: Arriving, staging: Path) -> None:
        """Add manifest and signature as they came, drop what is not of this version, and flush."""
        disk.unlink(staging / MANIFEST_NAME, missing_ok=True)
        disk.unlink(staging / SIGNATURE_NAME, missing_ok=True)
        disk.write_new(staging / MANIFEST_NAME, arriving.content)
        if arriving.signature:
            disk.write_new(staging / SIGNATURE_NAME, arriving.signature)
        for path in list(staging.iterdir()):
            if path.name.endswith(PART_SUFFIX) or path.name.startswith(atomic.TEMPORARY_PREFIX):
                disk.unlink(path)
            else:
                path.chmod(0o444)
        atomic.fsync_tree(staging)

    def _settle(self, staging: Path, number: int) -> None:
        """Give a sealed staging directory its number, or complete the one that has it."""
        target = self._store.path(number)
        if not target.exists():
            atomic.rename(staging, target)
            return
        for path in sorted(staging.iterdir(), key=lambda path: path.name == WEIGHTS_NAME):
            if path.name == MANIFEST_NAME and _is_same(path, target / MANIFEST_NAME):
                continue  # it stays: clients that have the version open hold a lock on it
            disk.rename(path, target / path.name)
        atomic.fsync_dir(target)
        atomic.remove_tree(staging)


def _is_same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _staging_name(arriving: Arriving) -> str:
    return f"{STAGING_PREFIX}{arriving.manifest.version}-{hashlib.sha256(arriving.content).hexdigest()[:12]}"
