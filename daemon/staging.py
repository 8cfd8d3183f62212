"""Folded weights become a staged version: everything that lies beside them, and what its manifest says.

Runs in the worker only: torch computes the reference outputs that clients check themselves against.
"""

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from daemon.batch import Batch
from daemon.founding import software_versions, write_class_list, write_reference
from daemon.live import Live
from deploy import atomic, disk
from deploy.delta import Delta, write_folded
from deploy.manifest import (
    DELTA_NAME,
    OPEN_CLIP_CONFIG_NAME,
    WEIGHTS_NAME,
    ClassEntry,
    FileRecord,
    Manifest,
)
from deploy.store import VersionStore
from deploy.weights import Array, read_weights
from dynlora.clip import load_version, reload_weights

_BLOCK_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class Candidate:
    """What a new version is made from."""

    store: VersionStore
    parent: Manifest
    batch: Batch
    delta: Delta
    delta_record: FileRecord
    classes: tuple[ClassEntry, ...]

    def manifest_draft(self, files: Mapping[str, FileRecord]) -> dict[str, Any]:
        """What is known of the manifest before the decision: all but version, time, operator and figures."""
        batch = self.batch
        lineage = [entry.model_dump() for entry in self.parent.lineage]
        return {
            "kind": "update",
            "batch": {
                "id": batch.id,
                "classes": [c.name for c in batch.classes],
                "images": {split: batch.count(split) for split in ("train", "tune", "exam")},
                "content_sha256": batch.content_sha256,
                "producer_id": batch.producer_id,
            },
            "lineage": [*lineage, {"batch": batch.id, "delta_sha256": self.delta_record.sha256}],
            **inherited(self.parent, files),
        }


def inherited(parent: Manifest, files: Mapping[str, FileRecord]) -> dict[str, Any]:
    """What every manifest takes over from its parent's, with its own files and today's software."""
    return {
        "parent": parent.version,
        "architecture": parent.architecture,
        "embed_dim": parent.embed_dim,
        "context_length": parent.context_length,
        "logit_scale": parent.logit_scale,
        "logit_bias": parent.logit_bias,
        "temperature": parent.temperature,
        "files": {name: record.model_dump() for name, record in files.items()},
        "software": software_versions(),
    }


@dataclass(frozen=True)
class Staged:
    """A filled staging directory, manifest.json apart.

    Attributes:
        weights: record of weights.safetensors, hashed while it was written.
        drift: ‖θ − θ₀‖_F, how far the weights are from version 0 now.
    """

    directory: Path
    weights: FileRecord
    drift: float


def stage_candidate(
    candidate: Candidate, delta_path: Path, *, live: Live | None = None, name: str | None = None
) -> Staged:
    """Fill a staging directory, manifest.json apart.

    Args:
        live: the parent as it is in memory, if it is; torch's model has the new weights afterwards.
        name: of the staging directory; by default the batch's id.

    Raises:
        ModelError: the file that was written cannot be loaded.
    """
    store, parent_dir = candidate.store, candidate.store.path(candidate.parent.version)
    staging = store.stage(name or candidate.batch.id, like=candidate.parent.version)
    disk.copy(delta_path, staging / DELTA_NAME)
    weights = write_folded(
        staging / WEIGHTS_NAME, read_weights(parent_dir / WEIGHTS_NAME), [candidate.delta], is_flushed=False
    )
    drift = write_beside_weights(staging, store, candidate.parent, candidate.classes, live=live)
    return Staged(staging, weights, drift)


def write_beside_weights(
    staging: Path,
    store: VersionStore,
    parent: Manifest,
    classes: tuple[ClassEntry, ...],
    *,
    live: Live | None = None,
) -> float:
    """Class list, embeddings and reference outputs of the weights that lie in a staging directory.

    Args:
        live: the parent in memory; torch's model has the new weights afterwards.

    Returns:
        ‖θ − θ₀‖_F: how far the weights are from version 0 now.
    """
    path = staging / WEIGHTS_NAME
    # Beside torch's work. The weights are flushed in any case when they are published: begun now, that takes
    # no time then. The drift is read from the files too.
    with ThreadPoolExecutor(2, thread_name_prefix="beside") as beside:
        flushing = beside.submit(atomic.fsync_file, path)
        drift = beside.submit(distance, read_weights(path), read_weights(store.path(0) / WEIGHTS_NAME))
        # From the file, not from memory: what torch says here is what every client must find.
        if live is None:
            clip = load_version(staging / OPEN_CLIP_CONFIG_NAME, path, parent.architecture)
        else:
            clip = live.clip
            reload_weights(clip, path)
        write_class_list(staging, clip, classes)
        write_reference(staging, clip, image_embeds=live.reference_of(staging) if live is not None else None)
        flushing.result()
        return drift.result()


def distance(one: dict[str, Array], other: dict[str, Array]) -> float:
    """Frobenius norm of the difference over all tensors, summed in float64."""
    return math.sqrt(sum(_squared_distance(one[key], other[key]) for key in sorted(one)))


def _squared_distance(one: Array, other: Array) -> float:
    """By blocks that stay in the cache."""
    first, second, total = one.reshape(-1), other.reshape(-1), 0.0
    for begin in range(0, first.size, _BLOCK_ELEMENTS):
        part = slice(begin, begin + _BLOCK_ELEMENTS)
        if not np.array_equal(first[part], second[part]):
            difference = np.subtract(first[part], second[part], dtype=np.float64)
            total += float(difference @ difference)
    return total
