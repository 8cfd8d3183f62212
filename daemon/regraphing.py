"""The live weights under graphs that today's torch exports: staged and verified. Worker only.

Weights, class list and embeddings, and torch's reference outputs are copied: that the new graphs give the
outputs which were recorded for the old ones is what shows that no answer changes.
"""

from pathlib import Path
from typing import Any

from daemon.child import Outlet
from daemon.staging import inherited
from deploy import atomic, disk
from deploy.export import export_graphs
from deploy.manifest import (
    CLASS_EMBEDDINGS_NAME,
    CLASSES_NAME,
    GRAPH_NAMES,
    OPEN_CLIP_CONFIG_NAME,
    REFERENCE_NAME,
    WEIGHTS_NAME,
)
from deploy.store import VersionStore
from deploy.verify import verify_staged
from dynlora.clip import load_version

STAGING_NAME = "regraph"
_COPIED = (WEIGHTS_NAME, CLASSES_NAME, CLASS_EMBEDDINGS_NAME, REFERENCE_NAME)


def stage_regraph(home: Path, parent: int, *, outlet: Outlet) -> dict[str, Any] | None:
    """Stage the version `parent` with graphs exported anew; its manifest's draft.

    Returns:
        None where the export gives the graphs that are there: then nothing is staged.

    Raises:
        ModelError, ExportError: the version cannot be loaded or exported with what is installed.
        VerifyError: the new graphs do not give what torch gave; nothing may be published.
    """
    store = VersionStore(home / "serving")
    manifest, directory = store.manifest(parent), store.path(parent)
    clip = load_version(directory / OPEN_CLIP_CONFIG_NAME, directory / WEIGHTS_NAME, manifest.architecture)
    staging = store.stage(STAGING_NAME, like=parent)
    outlet.phase("export")
    records = export_graphs(
        clip.model, staging, context_length=clip.context_length, image_size=clip.image_size
    )
    if all(records[name] == manifest.files[name] for name in GRAPH_NAMES):
        atomic.remove_tree(staging)
        return None
    for name in _COPIED:
        disk.copy(directory / name, staging / name)
    outlet.phase("verify")
    checked = verify_staged(staging, embed_dim=manifest.embed_dim)
    return {
        **inherited(manifest, checked.files),
        "kind": "regraph",
        "lineage": [entry.model_dump() for entry in manifest.lineage],
        "drift_norm": manifest.drift_norm,
        "metrics": {"parity": checked.parity},
    }
