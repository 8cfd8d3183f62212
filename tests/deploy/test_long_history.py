"""A store of many versions: a manifest is as long as the history it tells, so few of them stay in memory."""

from pathlib import Path

import pytest

from deploy import store_reader
from deploy.space import prunable
from deploy.store import VersionStore
from tests.deploy.tiny import found_tiny, stage_update

VERSIONS = 14


@pytest.fixture(scope="module")
def serving_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Versions 0 to 14, all of them full."""
    store = found_tiny(tmp_path_factory.mktemp("store") / "serving")
    for number in range(1, VERSIONS + 1):
        store.publish(*stage_update(store, f"{number:06d}-x", [f"class {number}"]))
    return store.serving_dir


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The directories whose manifest is read from now on."""
    reads: list[Path] = []
    load = store_reader.load_manifest
    monkeypatch.setattr(store_reader, "load_manifest", lambda path: reads.append(path) or load(path))
    return reads


def test_what_is_asked_of_every_manifest_is_read_once(
    serving_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which batches are published, when and as what; the manifests themselves do not pile up."""
    reads, store = count_reads(monkeypatch), VersionStore(serving_dir)
    published = [store.published_batches() for _ in range(3)][-1]

    assert [entry.version for entry in published.values()] == list(range(1, VERSIONS + 1))
    assert store.summary(3).batch == "000003-x"
    assert len(reads) == VERSIONS + 1
    assert len(store._manifests) < VERSIONS


def test_what_may_be_pruned_is_found_without_reading_every_manifest_again(
    serving_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every publication: the newest few are looked into, of the others it is known what they are."""
    store = VersionStore(serving_dir)
    store.published_batches()
    reads = count_reads(monkeypatch)

    assert prunable(store, 3) == list(range(1, VERSIONS - 2))
    assert len(reads) <= 4
