"""A version under new graphs: what it may change, and what later versions need of it for ever."""

import shutil
from pathlib import Path

import pytest

from deploy.errors import StoreError
from deploy.manifest import GRAPH_NAMES, REQUIRED_NAMES, WEIGHTS_NAME, Manifest, record_files
from deploy.rebuild import adopt_rebuild, stage_rebuild
from deploy.space import state_of
from deploy.store import VersionStore
from tests.deploy.tiny import found_tiny, stage_update


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    """Versions 0 and 1."""
    store = found_tiny(tmp_path / "serving")
    store.publish(*stage_update(store, "000001-hat", ["hat"]))
    return store


def staged_regraph(store: VersionStore, graph: str, *, weights: bytes | None = None) -> tuple[Path, Manifest]:
    """The live version under other graphs, or with other weights than it may have."""
    live = store.live_manifest()
    staging = store.stage("regraph", like=live.version)
    for name in set(REQUIRED_NAMES) - {path.name for path in staging.iterdir()}:
        shutil.copyfile(store.path(live.version) / name, staging / name)
        (staging / name).chmod(0o644)
    for name in GRAPH_NAMES:
        (staging / name).write_text(graph)
    if weights is not None:
        (staging / WEIGHTS_NAME).write_bytes(weights)
    same = live.model_dump(include={"architecture", "embed_dim", "context_length", "logit_scale", "lineage"})
    given = {"version": store.next_version(), "parent": live.version, "kind": "regraph"}
    return staging, Manifest(**same, **given, files=record_files(staging))


def test_later_versions_have_the_new_graphs_and_can_still_be_rebuilt(store: VersionStore) -> None:
    """Also when the version that brought them was pruned, and the next graphs came since."""
    store.publish(*staged_regraph(store, "graph of another opset"))
    store.publish(*stage_update(store, "000002-cup", ["cup"]))
    store.publish(*staged_regraph(store, "graph of a third"))
    for number in (3, 4):
        store.publish(*stage_update(store, f"{number:06d}-x", [f"x {number}"]))
    graphs = {n: (store.path(n) / GRAPH_NAMES[0]).read_text() for n in store.versions()}
    assert [graphs[n] for n in (2, 3, 4, 5)] == [
        *["graph of another opset"] * 2,
        *["graph of a third"] * 2,
    ]
    assert graphs[0] == graphs[1] != graphs[2]
    weights = (store.path(3) / WEIGHTS_NAME).read_bytes()

    store.prune(keep_full=2)
    assert [state_of(store, n) for n in (2, 3, 4)] == ["pruned"] * 3
    assert (store.path(2) / GRAPH_NAMES[0]).exists()
    assert not (store.path(3) / GRAPH_NAMES[0]).exists()
    for version in (3, 1, 2):
        stage_rebuild(store, version)
        adopt_rebuild(store, version)
    assert (store.path(3) / WEIGHTS_NAME).read_bytes() == weights
    assert all((store.path(n) / GRAPH_NAMES[0]).read_text() == graphs[n] for n in (1, 2, 3))


def test_new_graphs_bring_no_other_weights_with_them(store: VersionStore) -> None:
    """Nor another lineage: what was learnt changes by batches alone."""
    with pytest.raises(StoreError, match="has the weights and the lineage of version 1"):
        store.publish(*staged_regraph(store, "graph", weights=b"other weights"))
    staging, manifest = staged_regraph(store, "graph")
    with pytest.raises(StoreError, match="has the weights and the lineage of version 1"):
        store.publish(staging, manifest.model_copy(update={"lineage": ()}))
    assert store.current() == 1
