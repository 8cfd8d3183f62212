"""Publishing is killed at every step, and runs out of disk at every step."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.errors import DeployError, StoreError
from deploy.manifest import REQUIRED_NAMES, Manifest, load_manifest, record_files
from deploy.store import VersionStore
from deploy.verify import check_files
from deploy.weights import write_weights

REPOSITORY = Path(__file__).parent.parent.parent
COMMON = {"architecture": "a", "embed_dim": 1, "context_length": 1, "logit_scale": 1.0}


def stage_first(store: VersionStore) -> tuple[Path, Manifest]:
    """Version 0 with a page or less in each file."""
    staging = store.stage("initial")
    for name in REQUIRED_NAMES:
        (staging / name).write_text(name)
    return staging, Manifest(version=0, kind="initial", files=record_files(staging), **COMMON)


def stage_next(store: VersionStore, batch: str) -> tuple[Path, Manifest]:
    """Write a version as the worker does: carried files, then the weights through the durable door."""
    live = store.live_manifest()
    staging = store.stage(batch, like=live.version)
    write_weights(staging / "weights.safetensors", {"w": np.arange(3000, dtype=np.float32)})
    for name in {*REQUIRED_NAMES, "delta.safetensors"} - {path.name for path in staging.iterdir()}:
        (staging / name).write_text(f"{name} of {batch}")
    files = record_files(staging)
    sha256 = files["delta.safetensors"].sha256
    images = {"train": 1, "tune": 0, "exam": 0}
    info = {"id": batch, "classes": [], "images": images, "content_sha256": sha256}
    lineage = [*live.lineage, {"batch": batch, "delta_sha256": sha256}]
    fields: dict[str, Any] = {"parent": live.version, "kind": "update", "batch": info, "lineage": lineage}
    return staging, Manifest(version=store.next_version(), files=files, **fields, **COMMON)


def assert_only_whole_versions_are_visible(serving_dir: Path) -> None:
    """What a reader may rely on at any moment: `current` and every number are complete, checked versions."""
    store = VersionStore(serving_dir)
    assert store.current() in store.versions()
    for version in store.versions():
        check_files(store.path(version), load_manifest(store.path(version)).files)


# Run in a process of its own, which forks: argument 1 is a store of version 0, each try gets a copy.
# The child kills itself at its n-th change of the file system; the parent prints where, and how it ended.
KILL_SCRIPT = """
import os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, "tests/deploy")
import test_publish_faults as faults
from deploy.store import VersionStore

CALLS = ("open", "write", "fsync", "rename", "symlink", "unlink", "mkdir", "rmdir", "chmod", "fchmod")

def arm(countdown):
    def armed(name, real):
        def call(*args, **kwargs):
            nonlocal countdown
            countdown -= 1
            if countdown == 0:
                print("killed before", name, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    for name in CALLS:
        setattr(os, name, armed(name, getattr(os, name)))

def die_at(step, serving_dir, act):
    child = os.fork()
    if child == 0:
        store = VersionStore(serving_dir)
        arm(step)
        act(store)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status)

def publish(store):
    store.publish(*faults.stage_next(store, "1-cats"))

base, act = Path(sys.argv[1]), {"publish": publish,
    "recover": lambda store: store.recover(),
    "roll_back": lambda store: store.roll_back(to=0, who="ann", why="")}[sys.argv[2]]
step = 0
while True:
    step += 1
    serving_dir = base.parent / f"try-{step}"
    shutil.copytree(base, serving_dir, symlinks=True)
    was_killed = die_at(step, serving_dir, act)
    faults.assert_only_whole_versions_are_visible(serving_dir)
    store = VersionStore(serving_dir)
    before = store.versions()
    store.recover()
    faults.assert_only_whole_versions_are_visible(serving_dir)
    assert store.recover() == [], "a second recovery finds nothing to do"
    assert all(name.isdigit() for name in os.listdir(store.versions_dir))
    assert set(os.listdir(serving_dir)) <= {"current", "versions", "pin.json"}
    after = (store.versions(), store.current(), store.pin() is not None)
    print("try", step, was_killed, before, *after, flush=True)
    if not was_killed:
        break
"""


def run_killed(base: Path, act: str) -> list[list[str]]:
    """Run the script; return the words of each try's line: try, step, killed, versions before, …"""
    done = subprocess.run(
        [sys.executable, "-c", KILL_SCRIPT, str(base), act],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    print(done.stdout)
    return [line.replace(", ", ",").split() for line in done.stdout.splitlines() if line.startswith("try")]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A store of version 0, small."""
    store = VersionStore(tmp_path / "base")
    store.create()
    store.publish(*stage_first(store))
    return tmp_path / "base"


def test_a_publication_killed_at_any_step_is_finished_or_undone(base: Path) -> None:
    """Killed with -9 before each change of the disk: only whole versions are seen, and recovery decides."""
    tries = run_killed(base, "publish")
    assert len(tries) > 30
    ends = [(versions, current) for _, _, _, _, versions, current, _ in tries]
    undone, finished = ("[0]", "0"), ("[0,1]", "1")
    first = ends.index(finished)
    assert first > 20
    assert ends == [undone] * first + [finished] * (len(ends) - first)
    # The new number is there before `current` is: killed in between, recovery finishes the publication.
    assert any(before == "[0,1]" for _, _, killed, before, *_ in tries if killed == "True")


def test_a_recovery_killed_at_any_step_is_finished_by_the_next(base: Path) -> None:
    """Recovery is itself recovered from."""
    store = VersionStore(base)
    staging, manifest = stage_next(store, "1-cats")
    store.publish(staging, manifest)
    # As if killed between the two renames of a publication, with leftovers lying about.
    (base / "current").unlink()
    (base / "current").symlink_to("versions/0")
    (base / ".next").symlink_to("versions/1")
    stage_next(store, "2-dogs")
    (base / ".tmp-current-1-2").symlink_to("versions/0")
    tries = run_killed(base, "recover")
    assert len(tries) > 10
    assert {(versions, current) for _, _, _, _, versions, current, _ in tries} == {("[0,1]", "1")}


def test_a_roll_back_killed_at_any_step_is_finished_or_not_begun(base: Path) -> None:
    """Pin and link agree after recovery: version 0 pinned, or version 1 and no pin."""
    store = VersionStore(base)
    store.publish(*stage_next(store, "1-cats"))
    ends = {(current, pinned) for *_, current, pinned in run_killed(base, "roll_back")}
    assert ends == {("1", "False"), ("0", "True")}


def test_a_roll_back_over_a_publication_that_broke_off_wins_or_is_not_begun(base: Path) -> None:
    """Killed at any step: without the pin the publication is finished, with it it is dropped for good."""
    VersionStore(base).publish(*stage_next(VersionStore(base), "1-cats"))
    (base / "current").unlink()
    (base / "current").symlink_to("versions/0")
    (base / ".next").symlink_to("versions/1")
    ends = {(current, pinned) for *_, current, pinned in run_killed(base, "roll_back")}
    assert ends == {("1", "False"), ("0", "True")}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 pages of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=256k,nr_inodes=64", "tmpfs", str(disk)]
    try:
        done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount program here")
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path, free_pages: int, free_inodes: int) -> None:
    """Leave so much room and no more."""
    state = os.statvfs(disk)
    if state.f_ffree < free_inodes + 1 or state.f_bavail < free_pages:
        raise ValueError("the disk is too small for this test")
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, state.f_bavail - free_pages) * state.f_frsize)
    for index in range(os.statvfs(disk).f_ffree - free_inodes):
        (disk / f"inode-{index}").touch()


def empty(disk: Path) -> None:
    """Take the filling away."""
    for path in (disk / "filler", *disk.glob("inode-*")):
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("scarce", ["pages", "inodes"])
def test_a_full_disk_at_any_stage_of_a_publication_changes_nothing_visible(
    small_disk: Path, scarce: str
) -> None:
    """From staging to the last link: an error that says what is live, and the same works later."""
    store = VersionStore(small_disk / "serving")
    store.create()
    store.publish(*stage_first(store))
    said = []
    for room in range(30):
        fill(
            small_disk,
            **(
                {"free_pages": room, "free_inodes": 25}
                if scarce == "pages"
                else {"free_pages": 25, "free_inodes": room}
            ),
        )
        try:
            assert store.publish(*stage_next(store, "1-cats")) == 1
            break
        except (OSError, DeployError) as error:
            said.append(error)
        assert_only_whole_versions_are_visible(store.serving_dir)
        assert (store.current(), store.versions()) == (0, [0])
        assert not (store.serving_dir / ".next").is_symlink()
        empty(small_disk)
        store.recover()
    assert store.current() == 1
    assert len(said) > 5
    assert all("No space left on device" in str(error) for error in said)
    # The last steps are publish's own; it tells where they leave the store.
    publishing = [str(error) for error in said if isinstance(error, StoreError)]
    assert publishing
    assert all("Nothing of it is visible; version 0 is still live" in text for text in publishing)


def test_a_full_disk_publishes_later_from_the_same_staging(small_disk: Path) -> None:
    """What was learnt is not lost: once there is room, the staged version is published as it lies."""
    store = VersionStore(small_disk / "serving")
    store.create()
    store.publish(*stage_first(store))
    staging, manifest = stage_next(store, "1-cats")
    fill(small_disk, 0, 5)
    with pytest.raises(StoreError, match=r"version 1 could not be published: .*No space left.* Free space"):
        store.publish(staging, manifest)
    assert (store.current(), store.versions()) == (0, [0])
    empty(small_disk)
    assert store.publish(staging, manifest) == 1
    assert_only_whole_versions_are_visible(store.serving_dir)


def test_a_full_disk_during_a_roll_back_leaves_the_live_version(small_disk: Path) -> None:
    """No pin without its version, no version without its pin."""
    store = VersionStore(small_disk / "serving")
    store.create()
    store.publish(*stage_first(store))
    store.publish(*stage_next(store, "1-cats"))
    for room in range(2):  # the pin needs one inode, the new link a second
        fill(small_disk, 5, room)
        with pytest.raises(StoreError, match=r"rolling back to version 0 failed: .*No space left"):
            store.roll_back(who="ann", why="")
        assert (store.current(), store.pin()) == (1, None)
        empty(small_disk)
    assert store.roll_back(who="ann", why="") == 0
