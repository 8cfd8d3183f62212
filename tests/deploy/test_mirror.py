"""A mirror: what lies where, in which order, and that a reader of it ends with the same weights."""

import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.errors import ShareError
from deploy.manifest import DELTA_NAME, MANIFEST_NAME, WEIGHTS_NAME, file_record, load_manifest
from deploy.mirror import FolderTarget, mirror, open_target, wanted_files
from deploy.prune import prune_version
from deploy.pull import pull
from deploy.remote import POINTER_NAME, FolderRemote, open_remote
from deploy.store_reader import StoreReader
from tests.deploy.swaps import point, wait_for

BUCKET = "versions"


class Recording(FolderTarget):
    """A folder that remembers what was written, in order, and can fail before the n-th write."""

    def __init__(self, folder: Path, *, fail_at: int | None = None) -> None:
        super().__init__(folder)
        self.written: list[str] = []
        self._fail_at = fail_at

    def put(self, name: str, content: bytes | Path) -> None:
        if len(self.written) == self._fail_at:
            raise OSError("the network is gone")
        super().put(name, content)
        self.written.append(name)


def names_in(folder: Path, version: int) -> set[str]:
    """The files of a version there."""
    return {path.name for path in (folder / "versions" / str(version)).iterdir()}


def test_the_manifest_comes_after_its_files_and_the_pointer_last(serving: Path, tmp_path: Path) -> None:
    """So a reader never sees half a version; weights of the initial version only."""
    point(serving, 2)
    target = Recording(tmp_path / "mirror")

    report = mirror(StoreReader(serving), target)

    assert target.written[-1] == POINTER_NAME
    for version in (0, 1, 2):
        own = [name for name in target.written if name.startswith(f"versions/{version}/")]
        assert own[-1] == f"versions/{version}/{MANIFEST_NAME}"
    assert WEIGHTS_NAME in names_in(tmp_path / "mirror", 0)
    assert WEIGHTS_NAME not in names_in(tmp_path / "mirror", 1) | names_in(tmp_path / "mirror", 2)
    assert report.uploaded == len(target.written)
    assert mirror(StoreReader(serving), target).uploaded == 0


def test_a_mirror_that_broke_off_is_finished_by_the_next_run(serving: Path, tmp_path: Path) -> None:
    """Wherever it broke off, the pointer there led to a whole version, and nothing is sent twice."""
    point(serving, 1)
    complete = Recording(tmp_path / "complete")
    total = mirror(StoreReader(serving), complete).uploaded
    for step in (0, 4, 12, total - 1):
        folder = tmp_path / f"mirror-{step}"
        with pytest.raises(OSError, match="network is gone"):
            mirror(StoreReader(serving), Recording(folder, fail_at=step))
        assert not (folder / POINTER_NAME).exists()
        assert mirror(StoreReader(serving), Recording(folder)).uploaded == total - step


def test_the_policy_says_which_weights_lie_there(serving: Path, tmp_path: Path) -> None:
    """Weights that are no longer asked for are removed; manifests and deltas never are."""
    point(serving, 2)
    folder = tmp_path / "mirror"
    mirror(StoreReader(serving), FolderTarget(folder), full=1)
    assert WEIGHTS_NAME in names_in(folder, 2)
    point(serving, 1)
    prune_version(serving / "versions/2")

    report = mirror(StoreReader(serving), FolderTarget(folder), full=1)

    assert report.removed > 0
    assert WEIGHTS_NAME in names_in(folder, 1)
    assert WEIGHTS_NAME not in names_in(folder, 2)
    assert {MANIFEST_NAME, DELTA_NAME} <= names_in(folder, 2)


def test_damage_is_found_there_and_here(serving: Path, tmp_path: Path) -> None:
    """With check a changed file is written anew; a damaged one here is never sent."""
    folder = tmp_path / "mirror"
    mirror(StoreReader(serving), FolderTarget(folder))
    damaged = folder / "versions/1" / DELTA_NAME
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert mirror(StoreReader(serving), FolderTarget(folder)).uploaded == 0
    assert mirror(StoreReader(serving), FolderTarget(folder), check=True).uploaded == 1
    assert file_record(damaged) == load_manifest(serving / "versions/1").files[DELTA_NAME]

    source = serving / "versions/1" / DELTA_NAME
    source.chmod(0o644)
    source.write_bytes(source.read_bytes()[:-1] + b"?")
    damaged.unlink()
    with pytest.raises(ShareError, match="not what its manifest records"):
        mirror(StoreReader(serving), FolderTarget(folder))


def test_another_stores_mirror_is_not_written_over(serving: Path, tmp_path: Path) -> None:
    """Two stores at one address would be neither."""
    folder = tmp_path / "mirror"
    (folder / "versions/0").mkdir(parents=True)
    (folder / "versions/0" / MANIFEST_NAME).write_text("{}")

    with pytest.raises(ShareError, match="another store's"):
        mirror(StoreReader(serving), FolderTarget(folder))
    with pytest.raises(ShareError, match="cannot be written to"):
        open_target("https://example.org/versions")


def test_a_version_made_anew_under_an_old_number_is_not_mixed_in(serving: Path, tmp_path: Path) -> None:
    """A store restored from a copy counts on from there; nothing is written before all manifests agree."""
    folder = tmp_path / "a mirror"
    target = open_target(f"file://{tmp_path}/a%20mirror")  # the same folder that `pull` would read
    mirror(StoreReader(serving), target)
    last = max(StoreReader(serving).versions())
    other = folder / "versions" / str(last) / MANIFEST_NAME
    other.chmod(0o644)
    other.write_bytes(other.read_bytes().replace(b'"created_at"', b'"created_at" '))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    with pytest.raises(ShareError, match="another store's"):
        mirror(StoreReader(serving), target)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@given(
    weights=st.sets(st.integers(0, 9)),
    live=st.integers(0, 9),
    full=st.integers(0, 4),
)
def test_wanted_files_keep_history_and_no_more_weights_than_asked_for(
    version_dir: Path, weights: set[int], live: int, full: int
) -> None:
    """Every manifest is there and comes last; the initial weights are; the live ones before any other."""
    initial = load_manifest(version_dir)
    update = initial.model_copy(update={"kind": "revert", "parent": 0})
    manifests = {number: update if number else initial for number in range(10)}
    light = frozenset(initial.files) - {WEIGHTS_NAME}
    here = {n: light | ({WEIGHTS_NAME} if n in weights or n == 0 else frozenset()) for n in manifests}

    wanted = wanted_files(manifests, here, live=live, full=full)

    assert all(names[-1] == MANIFEST_NAME and set(names[:-1]) <= here[n] for n, names in wanted.items())
    assert WEIGHTS_NAME in wanted[0]
    extra = {number for number in wanted if number and WEIGHTS_NAME in wanted[number]}
    assert len(extra) <= full
    assert not (full and live and WEIGHTS_NAME in here[live]) or live in extra


@pytest.fixture(scope="module")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server in a process of its own; gives its address."""
    pytest.importorskip("moto", reason="moto is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path_factory.mktemp("moto") / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=log,
        stderr=log,
    )

    def answers() -> bool:
        assert server.poll() is None, "the S3 server ended"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(answers)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()
        log.close()


@pytest.fixture
def bucket(object_store: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new bucket there."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": object_store,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"{BUCKET}-{uuid.uuid4().hex[:8]}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}/clip"


def test_an_object_store_is_a_mirror_that_edge_machines_follow(
    bucket: str, serving: Path, tmp_path: Path
) -> None:
    """Through S3: publish, mirror, pull, roll back; resumed where an object is missing."""
    point(serving, 1)
    first = mirror(StoreReader(serving), open_target(bucket))
    edge = tmp_path / "edge"
    assert pull(open_remote(bucket), edge).version == 1
    expected = load_manifest(serving / "versions/1").files[WEIGHTS_NAME]
    assert file_record(edge / "versions/1" / WEIGHTS_NAME) == expected

    files: Any = open_target(bucket)
    files.remove(f"versions/2/{DELTA_NAME}")
    point(serving, 2)
    second = mirror(StoreReader(serving), files)
    report = pull(open_remote(bucket), edge)

    assert second.uploaded == 2  # the missing object and the pointer
    assert first.uploaded > 20
    assert (report.version, report.deltas_folded) == (2, 1)
    point(serving, 0)
    mirror(StoreReader(serving), open_target(bucket), check=True)
    assert pull(open_remote(bucket), edge).version == 0


def test_a_mirror_in_memory_goes_through_the_same_door(serving: Path) -> None:
    """Fsspec's own memory file system, as the simplest object store."""
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    address = f"memory://{uuid.uuid4().hex}"

    assert mirror(StoreReader(serving), open_target(address)).uploaded > 20
    assert mirror(StoreReader(serving), open_target(address), check=True).uploaded == 0


def test_a_plain_copy_of_a_mirror_is_a_remote(serving: Path, tmp_path: Path) -> None:
    """What lies there is plain files: copied by any means, it can be pulled from."""
    point(serving, 1)
    mirror(StoreReader(serving), FolderTarget(tmp_path / "mirror"))
    shutil.copytree(tmp_path / "mirror", tmp_path / "usb")

    assert pull(FolderRemote(tmp_path / "usb"), tmp_path / "edge").version == 1
