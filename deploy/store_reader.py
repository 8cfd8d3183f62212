"""What a version store holds, for those who only look: nothing here writes.

    serving/
      current -> versions/12
      pin.json                   while an operator holds the store at one version
      versions/12/

Works on a read-only directory, and beside a process that publishes: every change it makes is one
rename, so a reader sees a version whole or not at all.
"""

import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from deploy.errors import ManifestError, StoreError
from deploy.manifest import Manifest, load_manifest

CURRENT_NAME = "current"
PIN_NAME = "pin.json"
VERSIONS_NAME = "versions"
_MANIFESTS_KEPT = 8  # in memory: each is as long as the history it tells

_NUMBER = re.compile(r"0|[1-9][0-9]*")


class Pin(BaseModel):
    """An operator holds the store at one version; nothing is published until the pin is gone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int
    who: str
    why: str
    since: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))


@dataclass(frozen=True, slots=True)
class PublishedBatch:
    """Where a batch went, and by what a second delivery of it is recognised."""

    version: int
    producer_id: str | None
    content_sha256: str


@dataclass(frozen=True, slots=True)
class Summary:
    """What is remembered of every manifest: a manifest lists all batches and exams before it."""

    version: int
    kind: str
    created_at: datetime
    batch: str | None
    published: PublishedBatch | None  # where the version brought a batch in


class StoreReader:
    """The published versions under a serving directory.

    Args:
        serving_dir: the directory that holds ``current`` and ``versions/``.
    """

    def __init__(self, serving_dir: Path) -> None:
        self.serving_dir = Path(serving_dir)
        self.versions_dir = self.serving_dir / VERSIONS_NAME
        self._manifests: dict[int, Manifest] = {}  # the last few; a published manifest never changes
        self._summaries: dict[int, Summary] = {}

    def path(self, version: int) -> Path:
        """Return the directory of a version, whether it exists or not."""
        return self.versions_dir / str(version)

    def versions(self) -> list[int]:
        """Return the numbers of all published versions, pruned ones included, oldest first."""
        if not self.versions_dir.is_dir():
            return []
        names = [entry.name for entry in os.scandir(self.versions_dir)]
        return sorted(int(name) for name in names if _NUMBER.fullmatch(name))

    def full_versions(self) -> list[int]:
        """Return the versions that can be served: all their files are there, in their size."""
        return [version for version in self.versions() if self.is_full(version)]

    def is_full(self, version: int) -> bool:
        """Tell whether a version can be served (checks names and sizes; verify_version reads everything)."""
        try:
            files = self.manifest(version).files
            return all((self.path(version) / name).stat().st_size == files[name].bytes for name in files)
        except (OSError, StoreError):
            return False

    def next_version(self) -> int:
        """Return the number the next version gets; numbers are never used twice."""
        return max(self.versions(), default=-1) + 1

    def manifest(self, version: int) -> Manifest:
        """Return a published version's manifest.

        Raises:
            StoreError: there is no such version, or its manifest cannot be read.
        """
        if version not in self._manifests:
            try:
                found = load_manifest(self.path(version))
            except (ManifestError, OSError) as error:
                raise StoreError(f"version {version} cannot be used: {error}") from error
            if found.version != version:
                raise StoreError(f"{self.path(version)} holds the manifest of version {found.version}")
            self._manifests[version] = found
            while len(self._manifests) > _MANIFESTS_KEPT:
                del self._manifests[next(iter(self._manifests))]
        return self._manifests[version]

    def summary(self, version: int) -> Summary:
        """Return what is remembered of a version's manifest, which is read once.

        Raises:
            StoreError: as manifest().
        """
        if version not in self._summaries:
            manifest = self.manifest(version)
            batch, published = manifest.batch, None
            if batch is not None and manifest.kind in ("update", "promote"):
                published = PublishedBatch(version, batch.producer_id, batch.content_sha256)
            self._summaries[version] = Summary(
                version, manifest.kind, manifest.created_at, batch.id if batch else None, published
            )
        return self._summaries[version]

    def current(self) -> int:
        """Return the live version.

        Raises:
            StoreError: nothing is published yet, or ``current`` does not point at a version.
        """
        link = self.serving_dir / CURRENT_NAME
        if not link.is_symlink():
            if link.exists():
                raise StoreError(
                    f"{link} must be a link to versions/<number>, found something else. {self._cure()}"
                )
            if not self.versions():
                raise StoreError(f"{self.serving_dir} holds no version yet. Run `dynlora init` first.")
            raise StoreError(f"{link} is missing. {self._cure()}")
        target = link.readlink()
        if target.parent != Path(VERSIONS_NAME) or not _NUMBER.fullmatch(target.name):
            raise StoreError(f"{link} must point at versions/<number>, found {target}. {self._cure()}")
        if not self.path(int(target.name)).is_dir():
            raise StoreError(f"{link} points at {target}, which does not exist. {self._cure()}")
        return int(target.name)

    def live_manifest(self) -> Manifest:
        """Return the live version's manifest.

        Raises:
            StoreError: as current() and manifest().
        """
        return self.manifest(self.current())

    def pin(self) -> Pin | None:
        """Return the pin, or None.

        Raises:
            StoreError: pin.json cannot be read.
        """
        path = self.serving_dir / PIN_NAME
        try:
            return Pin.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise StoreError(
                f"{path} cannot be read, so nothing is published. Expected version, who, why and since; "
                f"delete it to release the pin. ({error.errors()[0]['msg']})"
            ) from error

    def published_batches(self) -> dict[str, PublishedBatch]:
        """Return {batch id: where it went} over all manifests, those of pruned versions included."""
        batches = {}
        for summary in map(self.summary, self.versions()):
            if summary.batch is not None and summary.published is not None:
                batches[summary.batch] = summary.published
        return batches

    def _cure(self) -> str:
        full = self.full_versions()
        if not full:
            return (
                "No complete version is left here: restore the directory from a copy, or run `dynlora init`."
            )
        return (
            f"Complete versions: {self._full_list()}. "
            f"Run `dynlora rollback --to {full[-1]}`, then `dynlora unpin`."
        )

    def _full_list(self) -> str:
        return ", ".join(str(version) for version in self.full_versions()) or "none"
