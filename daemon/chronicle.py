"""What became of a home's model, version by version, gathered from its files for people to look at.

Manifests say nearly all: exams before and after, kept ranks, norms, cosines, the decision. The spool adds
what was not published, and how many images each class had.
"""

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError

from daemon.errors import BatchError
from daemon.report import DECISION_NAME, RESULT_DIR
from daemon.spool import Spool
from deploy.errors import DeployError
from deploy.manifest import Decision, Manifest, load_classes
from deploy.store_reader import StoreReader


@dataclass(frozen=True)
class Unpublished:
    """A batch that is in held/ or failed/, and why."""

    batch: str
    state: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class ClassCount:
    """One class of the live version: where it came from, and the images of it in all batches on record."""

    name: str
    batch: str | None
    train: int
    exam: int


@dataclass(frozen=True)
class Chronicle:
    """Everything on the page; versions oldest first."""

    home: Path
    live: int
    manifests: tuple[Manifest, ...]
    classes: tuple[ClassCount, ...]
    unpublished: tuple[Unpublished, ...] = ()
    missing: tuple[str, ...] = field(default=())  # sentences about what could not be read

    def series(self, name: str) -> list[tuple[int, float]]:
        """(version, value) of a figure of the manifest or of its metrics, where it is known."""
        found = []
        for manifest in self.manifests:
            value = getattr(manifest, name, None)
            value = (manifest.metrics or {}).get(name) if value is None else value
            if isinstance(value, int | float):
                found.append((manifest.version, float(value)))
        return found


def gather(home: Path) -> Chronicle:
    """Read it all; nothing is computed anew.

    Raises:
        DeployError: there is no live version.
    """
    store, spool = StoreReader(home / "serving"), Spool(home)
    live = store.current()
    manifests, missing = [], []
    for version in store.versions():
        try:
            manifests.append(store.manifest(version))
        except DeployError as error:
            missing.append(str(error))
    return Chronicle(
        home=home.absolute(),
        live=live,
        manifests=tuple(manifests),
        classes=_count_classes(store, spool, live),
        unpublished=tuple(_unpublished(spool)),
        missing=tuple(missing),
    )


def moment(manifest: Manifest) -> str:
    """When a version was made, for people."""
    created: datetime = manifest.created_at
    return f"{created:%Y-%m-%d %H:%M}"


def _count_classes(store: StoreReader, spool: Spool, live: int) -> tuple[ClassCount, ...]:
    lineage = {entry.batch for entry in store.manifest(live).lineage}
    train: Counter[str] = Counter()
    exam: Counter[str] = Counter()
    for batch in spool.batches("done"):
        if batch.id in lineage:
            for image in batch.images:
                (exam if image.split == "exam" else train)[image.class_key] += 1
    entries = load_classes(store.path(live)).classes
    return tuple(ClassCount(e.name, e.batch, train[e.key], exam[e.key]) for e in entries)


def _unpublished(spool: Spool) -> list[Unpublished]:
    found = []
    for batch_id in spool.ids("held"):
        path = spool.state_dir("held") / batch_id / RESULT_DIR / DECISION_NAME
        try:
            rules = Decision.model_validate_json(path.read_bytes()).rules
            reasons = tuple(rule.detail for rule in rules if not rule.passed)
        except (OSError, ValidationError) as error:
            reasons = (f"{path.name} cannot be read: {error}",)
        found.append(Unpublished(batch_id, "held", reasons))
    for batch_id in spool.ids("failed"):
        try:
            reasons = (spool.reason(batch_id).reason,)
        except BatchError as error:
            reasons = (str(error),)
        found.append(Unpublished(batch_id, "failed", reasons))
    return found
