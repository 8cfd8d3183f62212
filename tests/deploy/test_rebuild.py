"""What was thinned, pruned or damaged becomes what it was, byte for byte, or an error says why not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.delta import save_delta
from deploy.errors import StoreError, VerifyError
from deploy.lineage import ancestry, classes_without, reverted_batches
from deploy.manifest import (
    DELTA_NAME,
    TOKENIZER_NAME,
    VISION_GRAPH_NAME,
    WEIGHTS_NAME,
    class_key,
    file_record,
    load_classes,
)
from deploy.opening import hold_shared_lock
from deploy.rebuild import adopt_rebuild, lacking_files, stage_rebuild
from deploy.space import prunable, prune, state_of, thin, thinnable
from deploy.store import VersionStore
from deploy.verify import check_files
from deploy.weights import read_weights
from tests.deploy.tiny import found_tiny, stage_revert, stage_update, tiny_delta, tiny_weights

ROOT = Path(__file__).resolve().parents[2]
# Another BLAS kernel, other thread counts: nothing of it may reach a bit of the fold.
OTHER_MACHINE = {
    "OPENBLAS_CORETYPE": "Prescott",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "3",
    "MKL_CBWR": "COMPATIBLE",
    "NPY_DISABLE_CPU_FEATURES": "",
}
REBUILD = """
import sys
from pathlib import Path
from deploy.rebuild import stage_rebuild, adopt_rebuild
from deploy.store import VersionStore
store = VersionStore(Path(sys.argv[1]))
for version in map(int, sys.argv[2:]):
    stage_rebuild(store, version)
    adopt_rebuild(store, version)
"""


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    """Versions 0 to 5; every batch but the first adds images to `shared` too."""
    store = found_tiny(tmp_path / "serving")
    for number in range(1, 6):
        names = [f"class {number}"] if number == 1 else [f"class {number}", "shared"]
        store.publish(*stage_update(store, f"{number:06d}-batch", names))
    return store


def rebuild(store: VersionStore, version: int) -> list[str]:
    """Both halves, one after the other."""
    stage_rebuild(store, version)
    return adopt_rebuild(store, version)


def test_a_thinned_version_lacks_its_weights_alone_and_is_rebuilt_to_the_same_bytes(
    store: VersionStore,
) -> None:
    """Every file is what the manifest of that time records, and it can be rolled back to."""
    freed = thin(store, [1, 2])

    assert freed.versions == [1, 2]
    assert freed.bytes == 2 * (store.path(0) / WEIGHTS_NAME).stat().st_size
    assert [state_of(store, version) for version in store.versions()] == [
        "full",
        "thin",
        "thin",
        *["full"] * 3,
    ]
    assert rebuild(store, 2) == [WEIGHTS_NAME]
    check_files(store.path(2), store.manifest(2).files)
    assert store.roll_back(to=2, who="ann", why="") == 2


def test_a_pruned_version_becomes_whole_with_graphs_from_another_one(store: VersionStore) -> None:
    """All that was removed is there again, read-only, and nothing else."""
    assert prune(store, [1]).versions == [1]
    assert state_of(store, 1) == "pruned"

    assert VISION_GRAPH_NAME in rebuild(store, 1)

    assert state_of(store, 1) == "full"
    check_files(store.path(1), store.manifest(1).files)
    assert {oct(path.stat().st_mode & 0o777) for path in store.path(1).iterdir()} == {"0o444"}
    assert not list(store.versions_dir.glob(".staging-*"))


def test_a_process_with_another_blas_and_thread_setting_rebuilds_the_same_bytes(store: VersionStore) -> None:
    """The hash that the first process recorded is what the other one arrives at."""
    thin(store, [1, 2])
    prune(store, [3])

    done = subprocess.run(
        [sys.executable, "-c", REBUILD, str(store.serving_dir), "1", "2", "3"],
        cwd=ROOT,
        env=os.environ | OTHER_MACHINE | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    for version in (1, 2, 3):
        check_files(store.path(version), store.manifest(version).files)


def test_a_damaged_file_is_replaced_by_what_was_published(store: VersionStore) -> None:
    """Same size, other content: only reading shows it."""
    for name in (WEIGHTS_NAME, TOKENIZER_NAME):
        path = store.path(3) / name
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.chmod(0o644)
        path.write_bytes(content)

    assert lacking_files(store, 3) == sorted([TOKENIZER_NAME, WEIGHTS_NAME])
    assert rebuild(store, 3) == [TOKENIZER_NAME, WEIGHTS_NAME]
    check_files(store.path(3), store.manifest(3).files)
    assert rebuild(store, 3) == [], "nothing is lacking any more"


def test_weights_that_fold_to_another_hash_are_refused_and_nothing_is_changed(store: VersionStore) -> None:
    """The manifest decides: here it records other weights than its lineage gives."""
    manifest = store.manifest(2)
    wrong = manifest.files[WEIGHTS_NAME].model_copy(update={"sha256": "0" * 64})
    store._manifests[2] = manifest.model_copy(update={"files": manifest.files | {WEIGHTS_NAME: wrong}})
    thin(store, [2])

    with pytest.raises(VerifyError, match=r"version 2 cannot be rebuilt: folding 2 deltas .* expected 0{64}"):
        stage_rebuild(store, 2)
    assert not (store.path(2) / WEIGHTS_NAME).exists()
    assert not list(store.versions_dir.glob(".staging-*"))


@pytest.mark.parametrize("spoilt", ["delta", "base"])
def test_a_damaged_delta_or_first_version_is_named_and_keeps_weights_from_being_thinned(
    store: VersionStore, spoilt: str
) -> None:
    """What could not come back does not go."""
    path = store.path(1) / DELTA_NAME if spoilt == "delta" else store.path(0) / WEIGHTS_NAME
    path.chmod(0o644)
    if spoilt == "delta":
        save_delta(path, tiny_delta(99))
    else:
        path.unlink()

    freed = thin(store, [2])

    assert freed.versions == []
    assert "it could not be rebuilt" in freed.kept[2]
    assert (store.path(2) / WEIGHTS_NAME).exists()
    (store.path(2) / WEIGHTS_NAME).unlink()
    with pytest.raises(StoreError, match="estore it from a copy"):
        stage_rebuild(store, 2)


def test_the_first_versions_weights_come_from_nowhere(store: VersionStore) -> None:
    """It says so instead of folding nothing into nothing."""
    (store.path(0) / WEIGHTS_NAME).unlink()

    with pytest.raises(StoreError, match="is the first one: its weights are folded from nothing"):
        stage_rebuild(store, 0)


def test_live_previous_pinned_first_and_open_versions_keep_their_weights(store: VersionStore) -> None:
    """Each with its own reason; the others go."""
    store.roll_back(to=3, who="ann", why="")
    lock = hold_shared_lock(store.path(1) / "manifest.json")
    assert lock is not None
    try:
        freed = thin(store, store.versions())
    finally:
        os.close(lock)

    assert freed.versions == [4, 5]
    assert {version: why.split(",")[0] for version, why in freed.kept.items()} == {
        0: "it is the first version",
        1: "a client has it open",
        2: "it is the one before the live version",
        3: "it is live",
    }
    assert thinnable(store) == [1]


def test_the_policy_names_exactly_what_pruning_removes(store: VersionStore) -> None:
    """A dry run is the truth."""
    thin(store, [1])

    planned = prunable(store, 2)

    assert planned == [1, 2, 3]
    assert prune(store, planned).versions == planned
    assert prunable(store, 2) == []
    assert prune(store, planned).versions == [], "done twice is done once"


def test_a_revert_is_the_fold_of_the_others_bit_for_bit_and_drops_only_its_own_classes(
    store: VersionStore,
) -> None:
    """Batch 2 of 5: the same bytes as a store that never had it; a class that others have too stays."""
    other = found_tiny(store.serving_dir.parent / "other")
    for number in (1, 3, 4, 5):
        names = [f"class {number}"] if number == 1 else [f"class {number}", "shared"]
        other.publish(*stage_update(other, f"{number:06d}-batch", names))

    version = store.publish(*stage_revert(store, "000002-batch"))

    expected = file_record(other.path(4) / WEIGHTS_NAME)
    assert store.manifest(version).files[WEIGHTS_NAME] == expected
    kept = {entry.name: entry.batch for entry in load_classes(store.path(version)).classes}
    assert "class 2" not in kept
    assert kept["shared"] == "000003-batch"
    assert kept.keys() == {entry.name for entry in load_classes(other.path(4)).classes}
    assert reverted_batches(store) == {"000002-batch": version}
    assert [manifest.version for manifest in ancestry(store, version)] == [6, 5, 4, 3, 2, 1, 0]


def test_reverting_everything_gives_the_first_version_back(store: VersionStore) -> None:
    """In any order, to the bit."""
    for number in (3, 1, 5, 2, 4):
        store.publish(*stage_revert(store, f"{number:06d}-batch"))

    live = store.path(store.current())
    assert (live / WEIGHTS_NAME).read_bytes() == (store.path(0) / WEIGHTS_NAME).read_bytes()
    assert [entry.key for entry in load_classes(live).classes] == [class_key("old")]
    assert {name: array.tolist() for name, array in read_weights(live / WEIGHTS_NAME).items()} == {
        name: array.tolist() for name, array in tiny_weights().items()
    }


def test_a_revert_of_what_is_not_in_the_lineage_or_of_more_is_refused(store: VersionStore) -> None:
    """A manifest says what it takes out, and takes out no more."""
    staging, manifest = stage_revert(store, "000002-batch")
    more = manifest.model_copy(update={"lineage": manifest.lineage[1:]})

    with pytest.raises(StoreError, match="the lineage must be version 5's without 000002-batch"):
        store.publish(staging, more)
    assert (
        classes_without(store, store.live_manifest(), "000009-other") == load_classes(store.path(5)).classes
    )
    store.publish(staging, manifest)
    again, twice = stage_revert(store, "000002-batch")
    with pytest.raises(StoreError, match="000002-batch is not in the lineage of version 6"):
        store.publish(again, twice)
