"""Stores with tiny but real weights and deltas: publish, revert and promote as the worker does, in memory.

The other files of a version are stand-ins of a few bytes: what a store does with them is copy and check.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploy import atomic
from deploy.delta import Delta, Factor, load_delta, save_delta, write_folded
from deploy.lineage import classes_without, fold_lineage, lineage_without
from deploy.manifest import (
    CLASS_EMBEDDINGS_NAME,
    DELTA_NAME,
    REQUIRED_NAMES,
    WEIGHTS_NAME,
    BatchInfo,
    ClassEntry,
    ClassesFile,
    ImageCounts,
    LineageEntry,
    Manifest,
    class_key,
    load_classes,
    record_files,
    save_classes,
)
from deploy.store import VersionStore
from deploy.weights import Array, read_weights, write_weights

ROWS, COLUMNS = 24, 40
COMMON: dict[str, Any] = {"architecture": "tiny", "embed_dim": 4, "context_length": 1, "logit_scale": 1.0}


def tiny_weights() -> dict[str, Array]:
    """Two matrices that deltas change and a vector that none does."""
    rng = np.random.default_rng(5)
    shapes = {"a.weight": (ROWS, COLUMNS), "b.weight": (ROWS, COLUMNS), "c.bias": (COLUMNS,)}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def tiny_delta(seed: int, rank: int = 3) -> Delta:
    """An update of the lower rows of one matrix and of all rows of the other."""
    rng = np.random.default_rng(1000 + seed)

    def factor(key: str, start: int) -> Factor:
        shapes = ((ROWS - start, rank), (rank, COLUMNS), (rank,))
        return Factor(key, start, ROWS, *(rng.standard_normal(s, dtype=np.float32) for s in shapes))

    return Delta([factor("a.weight", ROWS // 2), factor("b.weight", 0)])


def found_tiny(serving_dir: Path, names: Sequence[str] = ("old",)) -> VersionStore:
    """A store of version 0."""
    store = VersionStore(serving_dir)
    store.create()
    staging = store.stage("initial")
    write_weights(staging / WEIGHTS_NAME, tiny_weights())
    _write_classes(staging, [ClassEntry(name=n, key=class_key(n), template="a {}") for n in names])
    _write_stand_ins(staging)
    store.publish(staging, Manifest(version=0, kind="initial", files=record_files(staging), **COMMON))
    return store


def stage_update(
    store: VersionStore, batch: str, names: Sequence[str], *, kind: str = "update", delta: Delta | None = None
) -> tuple[Path, Manifest]:
    """The live version with one more delta; kind promote where the delta was learnt before."""
    live = store.live_manifest()
    staging = store.stage(batch, like=live.version)
    record = save_delta(staging / DELTA_NAME, delta or tiny_delta(int(batch.split("-", maxsplit=1)[0])))
    base = read_weights(store.path(live.version) / WEIGHTS_NAME)
    write_folded(staging / WEIGHTS_NAME, base, [load_delta(staging / DELTA_NAME)])
    known = load_classes(store.path(live.version)).classes
    keys = {entry.key for entry in known}
    new = [
        ClassEntry(name=name, key=class_key(name), template="a {}", batch=batch)
        for name in names
        if class_key(name) not in keys
    ]
    _write_classes(staging, [*known, *new])
    _write_stand_ins(staging)
    lineage = (*live.lineage, LineageEntry(batch=batch, delta_sha256=record.sha256))
    return staging, _manifest(store, staging, kind, info_of(batch, names), lineage)


def stage_revert(store: VersionStore, batch: str) -> tuple[Path, Manifest]:
    """The live version without one batch."""
    live = store.live_manifest()
    lineage = lineage_without(live, batch)
    staging = store.stage(f"revert-{batch}", like=live.version)
    fold_lineage(store, live.version, lineage, staging / WEIGHTS_NAME)
    _write_classes(staging, classes_without(store, live, batch))
    _write_stand_ins(staging)
    return staging, _manifest(store, staging, "revert", info_of(batch, []), lineage)


def info_of(batch: str, names: Sequence[str]) -> BatchInfo:
    """What a manifest records of a batch."""
    counts = ImageCounts(train=1, tune=0, exam=0)
    return BatchInfo(
        id=batch,
        classes=tuple(names),
        images=counts,
        content_sha256=hashlib.sha256(batch.encode()).hexdigest(),
    )


def _manifest(
    store: VersionStore, staging: Path, kind: Any, batch: BatchInfo, lineage: tuple[LineageEntry, ...]
) -> Manifest:
    return Manifest(
        version=store.next_version(),
        parent=store.current(),
        kind=kind,
        batch=batch,
        lineage=lineage,
        files=record_files(staging),
        **COMMON,
    )


def _write_classes(staging: Path, entries: Sequence[ClassEntry]) -> None:
    save_classes(staging, ClassesFile(classes=tuple(entries)))
    embeddings = np.zeros((len(entries), COMMON["embed_dim"]), np.float32)
    embeddings[:, 0] = 1
    with (staging / CLASS_EMBEDDINGS_NAME).open("wb") as file:
        np.save(file, embeddings)


def _write_stand_ins(staging: Path) -> None:
    for name in REQUIRED_NAMES:
        if not (staging / name).exists():
            atomic.write_text(staging / name, f"{name} of the tiny model")
