"""An edge copy: deltas over the wire, the same hash at the end, and nothing believed that is not checked."""

import contextlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deploy.client import Client
from deploy.errors import DeployError, ShareError
from deploy.manifest import DELTA_NAME, MANIFEST_NAME, WEIGHTS_NAME, file_record
from deploy.mirror import mirror, open_target
from deploy.pull import PullOptions, PullReport, pull
from deploy.remote import FolderRemote, open_remote
from deploy.store import VersionStore
from deploy.store_reader import StoreReader
from tests.deploy.swaps import PICTURES, point

UNHEARD_OF = [{"batch": "unheard of", "delta_sha256": "0" * 64}]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def edge(tmp_path: Path) -> Path:
    """Where the copy goes."""
    return tmp_path / "edge"


@pytest.fixture(scope="session")
def pulled_once(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose live version is 0; not to be changed."""
    folder = tmp_path_factory.mktemp("pulled")
    source = folder / "source"
    shutil.copytree(published, source, symlinks=True)
    point(source, 0)
    fetch(source, folder / "edge")
    return folder / "edge"


@pytest.fixture
def copy_of_0(pulled_once: Path, edge: Path) -> Path:
    """A copy of one's own that has pulled version 0."""
    shutil.copytree(pulled_once, edge, symlinks=True)
    return edge


def fetch(source: Path, edge: Path, **options: Any) -> PullReport:
    """Pull from a folder."""
    return pull(FolderRemote(source), edge, PullOptions(**options))


def weights_of(serving: Path, version: int) -> Any:
    """Size and hash of a version's weights."""
    return file_record(serving / "versions" / str(version) / WEIGHTS_NAME)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A static file server that knows ranges, as nginx does, and can be told to break off or to redirect."""

    break_after: int | None = None
    redirect_to: str | None = None
    says_of_missing: int = 404
    asked: list[tuple[str, str | None]]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        kind = type(self)
        kind.asked.append((self.path, self.headers.get("Range")))
        if kind.redirect_to:
            self.send_response(302)
            self.send_header("Location", kind.redirect_to + self.path)
            self.end_headers()
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(kind.says_of_missing)
            return
        content, start = path.read_bytes(), 0
        if given := self.headers.get("Range"):
            start = int(given.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        limit, kind.break_after = kind.break_after, None if path.name == WEIGHTS_NAME else kind.break_after
        broken = limit is not None and path.name == WEIGHTS_NAME
        self.wfile.write(content[start : start + limit] if broken else content[start:])
        if broken:
            self.close_connection = True


@contextlib.contextmanager
def file_server(folder: Path) -> Iterator[tuple[str, type[Quiet]]]:
    """Serve a folder over HTTP; gives the address and the handler, to be told what to do."""
    handler = type("Handler", (Quiet,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_copy_follows_update_rollback_and_jump_with_the_same_hash(serving: Path, edge: Path) -> None:
    """Whatever is live there is live here, bit for bit, and a client of the copy answers with it."""
    point(serving, 1)
    first = fetch(serving, edge)
    point(serving, 2)
    second = fetch(serving, edge)

    assert (first.version, first.is_new, first.deltas_folded) == (1, True, 1)
    assert (second.version, second.before, second.deltas_folded) == (2, 1, 1)
    assert weights_of(edge, 2) == weights_of(serving, 2)
    with Client(edge) as client:
        assert client.version == 2
        point(serving, 1)
        back = fetch(serving, edge)
        assert client.refresh() == 1
        expected = Client(serving)
        assert (
            client.encode_images(PICTURES[:1]).values.tolist()
            == expected.encode_images(PICTURES[:1]).values.tolist()
        )
        expected.close()
    assert back.deltas_folded == 0
    assert back.bytes_moved < 100_000
    assert not fetch(serving, edge).is_new


def test_an_update_moves_no_weights(serving: Path, edge: Path) -> None:
    """After the first time neither weights nor graphs nor tokenizer come over the wire."""
    with file_server(serving) as (url, server):
        pull(open_remote(url), edge)
        point(serving, 2)
        server.asked.clear()
        report = pull(open_remote(url), edge)

    names = {path.rsplit("/", 1)[-1] for path, _ in server.asked}
    assert report.deltas_folded == 2
    assert DELTA_NAME in names
    assert not names & {WEIGHTS_NAME, "vision_model.onnx", "text_model.onnx", "tokenizer.json"}
    assert weights_of(edge, 2) == weights_of(serving, 2)


def test_old_versions_give_their_weights_back(serving: Path, edge: Path, publish_random_version: Any) -> None:
    """Version 0, the live and the previous version stay whole; one that was thinned can become live again."""
    for version in (1, 2):
        point(serving, version)
        fetch(serving, edge)
    publish_random_version(serving, 7)
    fetch(serving, edge)
    store = VersionStore(edge)

    assert store.full_versions() == [0, 2, 3]
    assert (edge / "versions/1" / DELTA_NAME).is_file()
    point(serving, 1)
    assert fetch(serving, edge).deltas_folded == 1
    assert weights_of(edge, 1) == weights_of(serving, 1)
    assert VersionStore(edge).full_versions() == [0, 1, 3]


def test_a_broken_download_goes_on_where_it_stopped(serving: Path, edge: Path) -> None:
    """A connection that breaks costs what was lost, not what had arrived."""
    with file_server(serving) as (url, server):
        server.break_after = 1_000_000
        report = pull(open_remote(url), edge)

    ranges = [given for path, given in server.asked if path.endswith(WEIGHTS_NAME)]
    assert ranges == [None, "bytes=1000000-"]
    assert report.version == 0
    assert weights_of(edge, 0) == weights_of(serving, 0)


def test_a_redirect_to_another_server_is_refused(serving: Path, edge: Path) -> None:
    """Whoever may answer for one host may not send us to another."""
    with file_server(serving) as (url, server), file_server(serving) as (other, _):
        server.redirect_to = other
        with pytest.raises(OSError, match="sends us on to http://127"):
            pull(open_remote(url), edge)

    assert VersionStore(edge).versions() == []


@pytest.mark.parametrize("is_mirror", [True, False])
def test_a_server_that_forbids_what_is_missing_is_pulled_from(
    serving: Path, edge: Path, tmp_path: Path, *, is_mirror: bool
) -> None:
    """S3 without the right to list, and CloudFront, answer 403 where others answer 404."""
    mirror(StoreReader(serving), open_target(str(tmp_path / "mirror")))
    with file_server(tmp_path / "mirror" if is_mirror else serving) as (url, server):
        server.says_of_missing = 403

        assert pull(open_remote(url), edge).version == 0


def test_a_server_that_forbids_everything_is_told_plainly(tmp_path: Path, edge: Path) -> None:
    """A wrong address and missing rights look the same from here."""
    with file_server(tmp_path) as (url, server):
        server.says_of_missing = 403
        with pytest.raises(
            ShareError, match=r"not there, or may not be read .*403 Forbidden.*Check the address"
        ):
            pull(open_remote(url), edge)


def change_manifest(serving: Path, version: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a published manifest, as someone would who controls the remote."""
    path = serving / "versions" / str(version) / MANIFEST_NAME
    document = json.loads(path.read_text())
    change(document)
    path.chmod(0o644)
    path.write_text(json.dumps(document))


def listing(name: str) -> Callable[[dict[str, Any]], None]:
    """A manifest that lists one more file."""
    return lambda document: document["files"].update({name: document["files"]["classes.json"]})


def recording(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    """A manifest that says something else of a file."""
    return lambda document: document["files"][name].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (listing("../../../escaped"), "no name for a file"),
        (listing("/tmp/escaped"), "no name for a file"),
        (listing(".bashrc"), "no name for a file"),
        (listing("manifest.json"), "no name for a file"),
        (recording("classes.json", bytes=1 << 50), "at most"),
        (recording(WEIGHTS_NAME, bytes=1 << 50), "at most"),
        (recording("classes.json", sha256="0" * 64), "not what its manifest records"),
        (recording(WEIGHTS_NAME, sha256="0" * 64), "weights folded for version 1"),
        (
            lambda document: document.update(lineage=[{"batch": "unheard of", "delta_sha256": "0" * 64}]),
            "history is not whole",
        ),
        (lambda document: document.pop("files"), "cannot be used"),
    ],
)
def test_a_hostile_remote_changes_nothing(
    serving: Path, copy_of_0: Path, tmp_path: Path, change: Any, message: str
) -> None:
    """Names, sizes, hashes and history are checked; the live version stays, and nothing lies elsewhere."""
    edge = copy_of_0
    point(serving, 1)
    change_manifest(serving, 1, change)
    before = sorted(tmp_path.iterdir())

    with pytest.raises(DeployError, match=message):
        fetch(serving, edge)

    assert VersionStore(edge).current() == 0
    assert sorted(tmp_path.iterdir()) == before
    assert VersionStore(edge).versions() in ([0], [0, 1])
    assert not VersionStore(edge).is_full(1)


def test_a_file_longer_than_its_record_is_cut_off(serving: Path, edge: Path) -> None:
    """No more bytes are read than the manifest allows."""
    path = serving / "versions/0/classes.json"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b" " * (1 << 20))

    with pytest.raises(ShareError, match="longer than the"):
        fetch(serving, edge)

    assert VersionStore(edge).versions() == []


def test_another_store_at_the_same_address_is_refused(
    serving: Path, copy_of_0: Path, version_maker: Any, tmp_path: Path
) -> None:
    """A store that was made anew shares numbers, not history."""
    edge = copy_of_0
    change_manifest(serving, 0, lambda document: document.update(operator="someone else"))

    with pytest.raises(ShareError, match="another one than"):
        fetch(serving, edge)


def test_a_store_that_was_not_pulled_is_left_alone(serving: Path, tmp_path: Path) -> None:
    """Pulling into a home's own store would mix two histories."""
    own = tmp_path / "own"
    shutil.copytree(serving, own, symlinks=True)

    with pytest.raises(ShareError, match="was not pulled"):
        fetch(serving, own)


def test_only_forward_if_asked(serving: Path, edge: Path) -> None:
    """A remote cannot talk an edge machine back to an older version that it does not want."""
    point(serving, 1)
    fetch(serving, edge)
    point(serving, 0)

    with pytest.raises(ShareError, match="only newer versions"):
        fetch(serving, edge, forward_only=True)
    assert fetch(serving, edge).version == 0


def test_damaged_base_weights_are_told_and_fetched_anew(serving: Path, copy_of_0: Path) -> None:
    """A bad disk here is no reason to give up for good."""
    edge = copy_of_0
    weights = edge / "versions/0" / WEIGHTS_NAME
    weights.chmod(0o644)
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        file.write(os.urandom(4096))
    point(serving, 1)

    with pytest.raises(ShareError, match="damaged and has been removed"):
        fetch(serving, edge)
    assert fetch(serving, edge).version == 1
    assert weights_of(edge, 1) == weights_of(serving, 1)


def damage(path: Path, *, cut_to: int | None = None) -> None:
    """Change one byte of a published file, or cut it short."""
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[-100] ^= 0x55
    path.write_bytes(content[:cut_to])


@pytest.fixture(scope="session")
def pulled_1_and_2(published: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store and its copy, which has pulled versions 1 and 2 and is at 1; neither is to be changed."""
    folder = tmp_path_factory.mktemp("pulled")
    source, copy = folder / "source", folder / "edge"
    shutil.copytree(published, source, symlinks=True)
    for version in (2, 1):
        point(source, version)
        fetch(source, copy)
    return source, copy


@pytest.mark.parametrize("cut_to", [None, 1000])
def test_a_damaged_delta_of_an_ancestor_is_fetched_anew(
    pulled_1_and_2: tuple[Path, Path], tmp_path: Path, cut_to: int | None
) -> None:
    """What the disk here spoilt does not stop the copy, nor is the sender blamed for it."""
    serving, edge = tmp_path / "serving", tmp_path / "edge"
    for source, target in zip(pulled_1_and_2, (serving, edge), strict=True):
        shutil.copytree(source, target, symlinks=True)
    (edge / "versions/2" / WEIGHTS_NAME).unlink()
    damage(edge / "versions/1" / WEIGHTS_NAME)
    damage(edge / "versions/1" / DELTA_NAME, cut_to=cut_to)
    point(serving, 2)

    report = fetch(serving, edge)

    assert (report.version, report.deltas_folded) == (2, 2)
    assert weights_of(edge, 2) == weights_of(serving, 2)
    assert file_record(edge / "versions/1" / DELTA_NAME) == file_record(serving / "versions/1" / DELTA_NAME)


@pytest.mark.parametrize("names", [[WEIGHTS_NAME], [DELTA_NAME, "classes.json"]])
def test_a_check_repairs_the_live_version_beside_a_client(
    pulled_1_and_2: tuple[Path, Path], tmp_path: Path, names: list[str]
) -> None:
    """Damage that changes no size is found by reading; a client takes the repaired version up."""
    serving, edge = pulled_1_and_2[0], tmp_path / "edge"
    shutil.copytree(pulled_1_and_2[1], edge, symlinks=True)
    manifest = (edge / "versions/1" / MANIFEST_NAME).stat().st_ino
    for name in names:
        damage(edge / "versions/1" / name)

    assert fetch(serving, edge).checked == 0
    report = fetch(serving, edge, check=True)

    assert (report.is_new, sorted(report.repaired)) == (False, sorted(names))
    assert weights_of(edge, 1) == weights_of(serving, 1)
    assert (edge / "versions/1" / MANIFEST_NAME).stat().st_ino == manifest  # clients have it locked
    again = fetch(serving, edge, check=True)
    assert (again.repaired, again.checked) == ((), len(VersionStore(edge).manifest(1).files))
    with Client(edge) as client:
        assert client.version == 1


def test_a_check_repairs_version_0(serving: Path, copy_of_0: Path) -> None:
    """The weights that are folded from nothing are fetched."""
    damage(copy_of_0 / "versions/0" / WEIGHTS_NAME)

    assert fetch(serving, copy_of_0, check=True).repaired == (WEIGHTS_NAME,)
    assert weights_of(copy_of_0, 0) == weights_of(serving, 0)


def test_a_version_that_was_damaged_meanwhile_does_not_become_live_again(
    pulled_1_and_2: tuple[Path, Path], tmp_path: Path
) -> None:
    """A roll-back to weights that are here reads them first, without being asked."""
    serving, edge = tmp_path / "serving", tmp_path / "edge"
    for source, target in zip(pulled_1_and_2, (serving, edge), strict=True):
        shutil.copytree(source, target, symlinks=True)
    damage(edge / "versions/2" / WEIGHTS_NAME)
    point(serving, 2)

    assert fetch(serving, edge).repaired == (WEIGHTS_NAME,)
    assert weights_of(edge, 2) == weights_of(serving, 2)


def test_base_weights_that_cannot_even_be_read_are_fetched_anew(serving: Path, copy_of_0: Path) -> None:
    """Damage in the head of the file, where its layout is told, is damage like any other."""
    weights = copy_of_0 / "versions/0" / WEIGHTS_NAME
    weights.chmod(0o644)
    with weights.open("r+b") as file:
        file.write(b"\xff" * 64)
    point(serving, 1)

    with pytest.raises(ShareError, match="damaged and has been removed"):
        fetch(serving, copy_of_0)
    assert fetch(serving, copy_of_0).version == 1


def test_two_pulls_at_once_do_not_meet(serving: Path, copy_of_0: Path) -> None:
    """The second one says so."""
    edge = copy_of_0
    import fcntl

    with (edge / ".pull.lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ShareError, match="another process pulls"):
            fetch(serving, edge)


KILLED = """
import os, signal, sys
from pathlib import Path
from deploy import atomic, fetch, installing, pull
from deploy.remote import FolderRemote

left = int(sys.argv[3])

def counted(module, name):
    original = getattr(module, name)
    def step(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    setattr(module, name, step)

for name in ("rename", "write_text", "replace_symlink", "fsync_tree", "fsync_dir", "make_dir"):
    counted(atomic, name)
for name in ("copy_file", "write_folded", "verify_version", "is_as_recorded"):
    counted(installing, name)
counted(fetch.Fetcher, "file")
pull.pull(FolderRemote(Path(sys.argv[1])), Path(sys.argv[2]))
print("finished")
"""


@pytest.mark.nightly
def test_a_pull_killed_at_any_step_is_finished_by_the_next(serving: Path, tmp_path: Path) -> None:
    """At every step: what was live is live and whole, and the next pull ends with the right hash."""
    point(serving, 0)
    template = tmp_path / "template"
    fetch(serving, template)
    point(serving, 2)
    step, finished = 0, False
    while not finished:
        step += 1
        edge = tmp_path / f"edge-{step}"
        shutil.copytree(template, edge, symlinks=True)
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(serving), str(edge), str(step)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        finished = done.stdout == "finished\n"
        assert finished or done.returncode == -signal.SIGKILL, done.stderr
        store = VersionStore(edge)
        assert store.is_full(store.current())
        assert fetch(serving, edge).version == 2
        assert weights_of(edge, 2) == weights_of(serving, 2)
        assert not list(edge.glob("versions/.*"))
        shutil.rmtree(edge)
    assert step > 15
