import errno
import fcntl
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from deploy import atomic
from deploy.errors import StoreError, VerifyError
from deploy.manifest import REQUIRED_NAMES, SIGNATURE_NAME, Manifest, record_files
from deploy.prune import KEPT_WHEN_PRUNED
from deploy.store import VersionStore
from deploy.store_reader import PublishedBatch

# These tests are about names, links and order, so their versions hold a few bytes per file.


def staged(store: VersionStore, batch: str | None, **changes: Any) -> tuple[Path, Manifest]:
    """Stage a version of small files on top of the live one; ``batch`` None makes the first."""
    live = store.live_manifest() if batch else None
    staging = store.stage(batch or "initial", like=live.version if live else None)
    for name in REQUIRED_NAMES:
        if not (staging / name).exists():
            (staging / name).write_text(f"{name} of {batch}")
    fields: dict[str, Any] = {"version": 0, "kind": "initial"}
    if live:
        (staging / "delta.safetensors").write_text(f"delta of {batch}")
        sha256 = record_files(staging)["delta.safetensors"].sha256
        fields = {
            "version": store.next_version(),
            "kind": "update",
            "parent": live.version,
            "batch": {
                "id": batch,
                "classes": [],
                "images": {"train": 1, "tune": 0, "exam": 0},
                "content_sha256": sha256,
                "producer_id": f"order {batch}",
            },
            "lineage": [*live.lineage, {"batch": batch, "delta_sha256": sha256}],
        }
    fields |= {"architecture": "a", "embed_dim": 1, "context_length": 1, "logit_scale": 1.0}
    return staging, Manifest(**(fields | {"files": record_files(staging)} | changes))


def publish(store: VersionStore, batch: str | None) -> int:
    """Stage and publish."""
    return store.publish(*staged(store, batch))


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    """A store that holds version 0."""
    store = VersionStore(tmp_path / "serving")
    store.create()
    publish(store, None)
    return store


def names(directory: Path) -> set[str]:
    """What is in a directory, hidden or not."""
    return {path.name for path in directory.iterdir()}


def test_a_published_version_is_live_complete_and_read_only(store: VersionStore) -> None:
    """Publishing gives the staged directory its number, its manifest and the link, and takes the pen away."""
    staging, manifest = staged(store, "1-cats")
    assert store.publish(staging, manifest) == 1
    assert (store.current(), store.versions()) == (1, [0, 1])
    assert (store.serving_dir / "current").readlink() == Path("versions/1")
    assert names(store.serving_dir) == {"current", "versions"}
    assert names(store.versions_dir) == {"0", "1"}
    assert VersionStore(store.serving_dir).live_manifest() == manifest
    for path in store.path(1).iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o444
        assert path.stat().st_nlink == 1


def test_the_manifest_is_written_last_in_staging(
    store: VersionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory with a manifest has all its files, flushed and checked."""
    staging, manifest = staged(store, "1-cats")
    flushed: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    store.publish(staging, manifest)
    first = next(i for i, name in enumerate(flushed) if "manifest.json" in name)
    assert set(manifest.files) <= set(flushed[:first])
    assert flushed[first + 1 :] == [staging.name, "serving", "versions", "serving"]


def test_a_new_version_starts_with_copies_of_what_all_versions_share(store: VersionStore) -> None:
    """Graphs, tokenizer and preprocessing are the parent's bytes, but not its files: links are refused."""
    staging = store.stage("1-cats", like=0)
    assert names(staging) == {
        "vision_model.onnx",
        "text_model.onnx",
        "tokenizer.json",
        "preprocessor_config.json",
        "open_clip_config.json",
    }
    for path in staging.iterdir():
        assert path.read_bytes() == (store.path(0) / path.name).read_bytes()
        assert not path.samefile(store.path(0) / path.name)
    (staging / "half").write_text("an earlier try")
    assert names(store.stage("1-cats")) == set()


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"version": 5}, StoreError, "next version is 1, the manifest says 5"),
        ({"version": 7, "parent": 3}, StoreError, "next version is 1"),
        ({"lineage": []}, StoreError, "lineage must be version 0's and then batch 1-cats"),
        ({"files": {}}, VerifyError, "does not list .'vision_model"),
    ],
)
def test_a_version_that_may_not_come_next_is_not_published(
    store: VersionStore, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    """Number, parent and lineage follow from the live version."""
    staging, manifest = staged(store, "1-cats", **changes)
    with pytest.raises(error, match=said):
        store.publish(staging, manifest)
    assert (store.current(), store.versions()) == (0, [0])


def test_a_version_built_on_another_than_the_live_one_is_not_published(store: VersionStore) -> None:
    """Whoever learnt while an operator changed the live version must learn again."""
    late, manifest = staged(store, "1-cats")
    publish(store, "2-dogs")
    moved = manifest.model_copy(update={"version": 2})
    with pytest.raises(StoreError, match="built on version 0, but version 1 is live: build it again"):
        store.publish(late, moved)
    assert store.current() == 1


def test_a_changed_graph_is_not_published(store: VersionStore) -> None:
    """The architecture stays the original one."""
    staging, _ = staged(store, "1-cats")
    (staging / "text_model.onnx").write_text("another graph")
    manifest = staged_manifest(store, staging)
    with pytest.raises(VerifyError, match=r"text_model\.onnx is not the parent's graph"):
        store.publish(staging, manifest)
    assert (store.current(), store.versions()) == (0, [0])


def staged_manifest(store: VersionStore, staging: Path) -> Manifest:
    """The manifest of batch 1-cats with the records of what is in ``staging`` now."""
    files = record_files(staging)
    other, manifest = staged(store, "1-dogs")
    atomic.remove_tree(other)
    entry = {"batch": "1-dogs", "delta_sha256": files["delta.safetensors"].sha256}
    return Manifest(**(manifest.model_dump(by_alias=True) | {"files": files, "lineage": [entry]}))


def test_a_file_that_changed_after_it_was_recorded_is_not_published(store: VersionStore) -> None:
    """Publishing reads every file again."""
    staging, manifest = staged(store, "1-cats")
    (staging / "weights.safetensors").write_text("weights.safetensors of 1-catz")
    with pytest.raises(VerifyError, match=r"weights\.safetensors is not what the manifest records"):
        store.publish(staging, manifest)
    assert (store.current(), store.versions()) == (0, [0])
    assert not (staging / "manifest.json").exists()


def test_publishing_the_live_batch_again_changes_nothing(store: VersionStore) -> None:
    """A batch that was published just before a crash is not published twice."""
    publish(store, "1-cats")
    again, manifest = staged(store, "2-dogs")
    batch, lineage = store.live_manifest().batch, store.live_manifest().lineage
    repeated = manifest.model_copy(update={"batch": batch, "parent": 0, "lineage": lineage})
    assert store.publish(again, repeated) == 1
    assert (store.versions(), again.exists()) == ([0, 1], False)


def test_rolling_back_pins_and_holds_publication_until_it_is_released(store: VersionStore) -> None:
    """Rollback re-points and never renumbers; after release the rolled-back version is the parent."""
    publish(store, "1-cats")
    publish(store, "2-dogs")
    assert store.roll_back(who="ann", why="wrong labels") == 1
    pin = store.pin()
    assert pin is not None
    assert (store.current(), pin.version, pin.who, pin.why) == (1, 1, "ann", "wrong labels")
    staging, manifest = staged(store, "3-birds")
    with pytest.raises(StoreError, match=r"version 1 is pinned by ann \(wrong labels\).*dynlora unpin"):
        store.publish(staging, manifest)
    assert store.unpin("ann").version == 1
    assert store.pin() is None
    assert store.publish(staging, manifest) == 3
    assert [entry.batch for entry in store.live_manifest().lineage] == ["1-cats", "3-birds"]
    assert set(store.published_batches()) == {"1-cats", "2-dogs", "3-birds"}
    with pytest.raises(StoreError, match="no version is pinned"):
        store.unpin("ann")


def test_a_recovery_after_release_does_not_roll_forward_again(store: VersionStore) -> None:
    """The newest number is not the live one by right."""
    publish(store, "1-cats")
    store.roll_back(to=0, who="ann", why="")
    store.unpin("ann")
    assert store.recover() == []
    assert (store.current(), store.next_version()) == (0, 2)


def test_a_publication_that_broke_off_is_not_finished_after_a_roll_back(
    store: VersionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator spoke last: neither the release of the pin nor a recovery brings the newer version up."""
    publish(store, "1-cats")
    rename = atomic.rename

    def refuse(source: Path, target: Path) -> None:
        if target.name == "current":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "rename", refuse)
        with pytest.raises(StoreError, match="version 2 is complete, but"):
            publish(store, "2-dogs")
    assert (store.serving_dir / ".next").is_symlink()
    store.roll_back(to=0, who="ann", why="")
    store.unpin("ann")
    store.complete()
    assert (store.current(), store.recover(), store.current()) == (0, [], 0)
    assert (store.versions(), publish(store, "3-birds")) == ([0, 1, 2], 3)


def test_releasing_a_pin_drops_what_a_roll_back_cut_short_left_announced(store: VersionStore) -> None:
    """Killed after the pin and before the announcement was taken back; nobody ran a recovery."""
    publish(store, "1-cats")
    store.roll_back(to=0, who="ann", why="")
    (store.serving_dir / ".next").symlink_to("versions/1")
    store.unpin("ann")
    assert (store.recover(), store.current()) == ([], 0)


def test_rolling_back_to_what_cannot_be_served_is_refused(store: VersionStore) -> None:
    """The message says which versions can be."""
    with pytest.raises(StoreError, match="version 0 is live and has no parent"):
        store.roll_back(who="ann", why="")
    for batch in ("1", "2", "3", "4"):
        publish(store, batch)
    store.prune(1)
    with pytest.raises(StoreError, match=r"version 1 cannot be served: .* Versions that can: 0, 3, 4"):
        store.roll_back(to=1, who="ann", why="")
    with pytest.raises(StoreError, match=r"version 9 cannot be used: .*manifest\.json does not exist"):
        store.roll_back(to=9, who="ann", why="")
    assert (store.current(), store.pin()) == (4, None)


def test_a_current_that_points_nowhere_says_what_to_do(store: VersionStore) -> None:
    """Dangling, missing, not a link, or pointing elsewhere: each has its sentence, and the cure works."""
    publish(store, "1-cats")
    link = store.serving_dir / "current"
    cure = r"Complete versions: 0, 1\. Run `dynlora rollback --to 1`"
    atomic.replace_symlink(link, "versions/7")
    with pytest.raises(StoreError, match=rf"points at versions/7, which does not exist\. {cure}"):
        store.current()
    atomic.replace_symlink(link, "/etc")
    with pytest.raises(StoreError, match=rf"must point at versions/<number>, found /etc\. {cure}"):
        store.current()
    link.unlink()
    with pytest.raises(StoreError, match=rf"current is missing\. {cure}"):
        store.current()
    link.write_text("versions/1")
    with pytest.raises(StoreError, match="must be a link to versions/<number>"):
        store.current()
    link.unlink()
    store.roll_back(to=1, who="ann", why="the link was lost")
    assert store.current() == 1


def test_an_empty_store_says_that_it_must_be_initialised(tmp_path: Path) -> None:
    """Not yet set up is another thing than broken."""
    store = VersionStore(tmp_path / "serving")
    with pytest.raises(StoreError, match=r"holds no version yet\. Run `dynlora init` first"):
        store.current()
    assert (store.versions(), store.next_version(), store.published_batches()) == ([], 0, {})


def test_an_unreadable_pin_stops_publication(store: VersionStore) -> None:
    """An operator's wish is not overlooked because its file was damaged."""
    staging, manifest = staged(store, "1-cats")
    (store.serving_dir / "pin.json").write_text("{")
    with pytest.raises(StoreError, match=r"pin\.json cannot be read, so nothing is published.*delete it"):
        store.publish(staging, manifest)
    assert store.current() == 0


def test_pruning_keeps_what_is_needed_and_the_history(store: VersionStore) -> None:
    """First, live, its parent, pinned and newest stay whole; the rest keeps manifest, delta, classes."""
    for batch in ("1", "2", "3", "4", "5"):
        publish(store, batch)
    store.roll_back(to=2, who="ann", why="")
    assert store.prune(1) == [3, 4]
    assert store.full_versions() == [0, 1, 2, 5]
    assert store.versions() == [0, 1, 2, 3, 4, 5]
    assert names(store.path(3)) == set(KEPT_WHEN_PRUNED) - {SIGNATURE_NAME}
    assert VersionStore(store.serving_dir).published_batches()["3"] == PublishedBatch(
        version=3, producer_id="order 3", content_sha256=store.manifest(3).lineage[-1].delta_sha256
    )
    assert store.prune(1) == []
    assert store.next_version() == 6


def test_a_version_that_a_client_has_open_is_not_pruned(store: VersionStore) -> None:
    """The client's shared lock on manifest.json holds the files until it lets go."""
    for batch in ("1", "2", "3"):
        publish(store, batch)
    with (store.path(1) / "manifest.json").open() as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        assert store.prune(1) == []
        assert store.is_full(1)
    assert store.prune(1) == [1]


def test_a_prune_that_was_cut_short_is_finished_by_the_next(store: VersionStore) -> None:
    """The weights go first, so a half-pruned version is never taken for a whole one."""
    for batch in ("1", "2", "3"):
        publish(store, batch)
    (store.path(1) / "weights.safetensors").unlink()
    assert not store.is_full(1)
    assert store.prune(3) == [1]
    assert names(store.path(1)) == set(KEPT_WHEN_PRUNED) - {SIGNATURE_NAME}


def test_pruning_everything_is_refused(store: VersionStore) -> None:
    """The live version stays whole, whatever the configuration says."""
    with pytest.raises(StoreError, match="keep_full must be at least 1, found 0"):
        store.prune(0)


def test_a_manifest_in_the_wrong_directory_is_found(store: VersionStore) -> None:
    """A directory copied under another number is not that version."""
    publish(store, "1")
    store.path(1).rename(store.path(4))
    with pytest.raises(StoreError, match="versions/4 holds the manifest of version 1"):
        VersionStore(store.serving_dir).manifest(4)


def test_real_versions_follow_each_other_in_the_store(serving_dir: Path, publish_random_version: Any) -> None:
    """With real files the lineage grows, and what is in a manifest is plain JSON for other programs."""
    store = VersionStore(serving_dir)
    assert [publish_random_version(serving_dir, seed) for seed in (1, 2)] == [1, 2]
    written = json.loads((serving_dir / "current" / "manifest.json").read_text())
    assert [entry["batch"] for entry in written["lineage"]] == ["000001-random", "000002-random"]
    assert store.is_full(2)
