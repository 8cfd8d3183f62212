"""What a version's weights are made of: the first version's, and the deltas of its lineage in order.

    weights(N) = fold(weights(0), deltas of N's lineage)

Looks things up and checks them against the manifests; deploy.delta does the arithmetic.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from deploy.delta import Delta, load_delta, write_folded
from deploy.errors import StoreError
from deploy.manifest import (
    DELTA_NAME,
    WEIGHTS_NAME,
    BatchInfo,
    ClassEntry,
    FileRecord,
    LineageEntry,
    Manifest,
    class_key,
    file_record,
    is_as_recorded,
    load_classes,
)
from deploy.store_reader import StoreReader
from deploy.weights import read_weights

# Called with the number of tensors written so far and of all there are.
Told = Callable[[int, int], None]


def ancestry(store: StoreReader, version: int) -> list[Manifest]:
    """Return the manifests from a version back to the first one, itself included.

    Raises:
        StoreError: a manifest cannot be read.
    """
    line = [store.manifest(version)]
    while (parent := line[-1].parent) is not None:
        line.append(store.manifest(parent))
    return line


def reverted_batches(store: StoreReader) -> dict[str, int]:
    """Return {batch: version} of what was taken out of the live version and is not back in it.

    Raises:
        StoreError: there is no live version, or a manifest cannot be read.
    """
    live = store.live_manifest()
    kept = {entry.batch for entry in live.lineage}
    return {
        manifest.batch.id: manifest.version
        for manifest in reversed(ancestry(store, live.version))
        if manifest.kind == "revert" and manifest.batch is not None and manifest.batch.id not in kept
    }


def batch_infos(store: StoreReader, lineage: Sequence[LineageEntry]) -> dict[str, BatchInfo]:
    """Return what the manifests record of the lineage's batches, in its order.

    Raises:
        StoreError: a manifest cannot be read, or none tells of one of the batches.
    """
    found = {
        manifest.batch.id: manifest.batch
        for manifest in map(store.manifest, store.versions())
        if manifest.batch is not None and manifest.kind in ("update", "promote")
    }
    if missing := [entry.batch for entry in lineage if entry.batch not in found]:
        raise StoreError(f"no version's manifest tells of {', '.join(missing)}: restore it from a copy")
    return {entry.batch: found[entry.batch] for entry in lineage}


def lineage_without(manifest: Manifest, batch: str) -> tuple[LineageEntry, ...]:
    """Return a version's lineage without one batch."""
    return tuple(entry for entry in manifest.lineage if entry.batch != batch)


def classes_without(store: StoreReader, manifest: Manifest, batch: str) -> tuple[ClassEntry, ...]:
    """Return a version's classes without those that only one batch of its lineage brought.

    A class that a later batch brought images of stays, and is that batch's from now on.

    Raises:
        StoreError, ManifestError: a manifest or the class list cannot be read.
    """
    rest = batch_infos(store, lineage_without(manifest, batch))
    keys = {name: {class_key(shown) for shown in info.classes} for name, info in rest.items()}
    kept = []
    for entry in load_classes(store.path(manifest.version)).classes:
        heir = next((name for name in rest if entry.key in keys[name]), None)
        if entry.batch != batch:
            kept.append(entry)
        elif heir is not None:
            kept.append(entry.model_copy(update={"batch": heir}))
    return tuple(kept)


def base_dir(store: StoreReader, version: int) -> Path:
    """Return the directory of the version whose weights a version is folded from.

    Raises:
        StoreError: its weights are gone, or a manifest cannot be read.
    """
    base = ancestry(store, version)[-1]
    path = store.path(base.version) / WEIGHTS_NAME
    if not path.is_file():
        raise StoreError(f"{path} is missing, and all weights are folded from it: restore it from a copy")
    return path.parent


def find_deltas(store: StoreReader, lineage: Sequence[LineageEntry]) -> list[Path]:
    """Return the delta files of a lineage in order, each read and found to be what is recorded.

    Raises:
        StoreError: one is missing or damaged; names the batch and what was looked for.
    """
    holders: dict[str, list[Path]] = {}
    for version in store.versions():
        record = store.manifest(version).files.get(DELTA_NAME)
        if record is not None:
            holders.setdefault(record.sha256, []).append(store.path(version) / DELTA_NAME)
    found = []
    for entry in lineage:
        paths = [path for path in holders.get(entry.delta_sha256, []) if path.is_file()]
        right = next((path for path in paths if file_record(path).sha256 == entry.delta_sha256), None)
        if right is None:
            state = f"{paths[0]} has other content" if paths else "no version holds it"
            raise StoreError(
                f"the delta of {entry.batch} (sha256 {entry.delta_sha256}) cannot be used: {state}. "
                "Restore it from a copy."
            )
        found.append(right)
    return found


def fold_lineage(
    store: StoreReader, like: int, lineage: Sequence[LineageEntry], path: Path, *, told: Told | None = None
) -> FileRecord:
    """Write the weights that a lineage gives, from the first version's; returns what was written.

    Args:
        like: a version that descends from the same first version.

    Raises:
        StoreError: what the fold needs is missing or damaged.
        DeltaError: a delta does not fit the weights.
        OSError: for instance a full disk; nothing was changed.
    """
    base = base_dir(store, like)
    expected = store.manifest(int(base.name)).files[WEIGHTS_NAME]
    if not is_as_recorded(base / WEIGHTS_NAME, expected):
        raise StoreError(f"{base / WEIGHTS_NAME} is not what its manifest records: restore it from a copy")
    deltas: list[Delta] = [load_delta(found) for found in find_deltas(store, lineage)]
    return write_folded(path, read_weights(base / WEIGHTS_NAME), deltas, told=told)
