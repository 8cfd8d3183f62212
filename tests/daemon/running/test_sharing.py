"""What the daemon shares after a change of the live version, and the commands that share by hand."""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from daemon.config import Config, MirrorConfig, SigningConfig, TritonConfig
from daemon.sharing import Sharing
from deploy.client import Client
from deploy.manifest import SIGNATURE_NAME
from deploy.remote import FolderRemote, read_pointer
from deploy.store import VersionStore

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def keys(tmp_path):
    """A private key and its public key."""
    pytest.importorskip("cryptography", reason="signatures need the signing extra")
    return importlib.import_module("tests.deploy.test_signing").make_key(tmp_path, "own")


def test_a_published_version_is_signed_mirrored_and_given_to_triton(bench, tmp_path, keys):
    """Each after every change of the live version, a roll-back among them; and idle means done."""
    bench.service.stop()
    bench.config = bench.config.model_copy(
        update={
            "signing": SigningConfig(key=str(keys[0])),
            "mirror": MirrorConfig(url=str(tmp_path / "mirror"), full=1),
            "triton": TritonConfig(repository=str(tmp_path / "models")),
        }
    )
    bench.new_service().start()
    bench.drop("cups")
    bench.run()

    assert (bench.store.path(1) / SIGNATURE_NAME).is_file()
    assert read_pointer(FolderRemote(tmp_path / "mirror")).version == 1
    assert (tmp_path / "mirror/versions/1" / SIGNATURE_NAME).is_file()
    assert (tmp_path / "models/dynlora_text/1/model.onnx/model.onnx").is_file()
    assert {"mirrored", "triton"} <= set(bench.events())

    bench.store.roll_back(to=0, who="ann", why="odd")
    bench.run()
    assert read_pointer(FolderRemote(tmp_path / "mirror")).version == 0
    assert not (tmp_path / "models/dynlora_text/1").exists()


def test_a_signature_made_later_is_mirrored_by_the_running_daemon(home, dynlora, tmp_path, keys):
    """The live version stays the same; a signature is news, and one of another key is news again."""
    new = importlib.import_module("tests.deploy.test_signing").make_key(tmp_path, "new")
    there = tmp_path / "mirror"
    told = []
    config = Config(mirror=MirrorConfig(url=str(there)))
    shared = Sharing(home / "serving", config, lambda name, **_: told.append(name))
    tick_until(shared, shared.is_done)
    signature = there / "versions/0" / SIGNATURE_NAME
    assert (signature.exists(), told) == (False, ["mirrored"])

    for (private, _), expected in ((keys, ["mirrored"] * 2), (new, ["mirrored"] * 3)):
        assert dynlora("--home", home, "sign", "--all", "--key", private)[1] == "signed 0\n"
        tick_until(shared, lambda expected=expected: told == expected)
        assert signature.read_bytes() == (home / "serving/versions/0" / SIGNATURE_NAME).read_bytes()
    tick_until(shared, shared.is_done)
    assert told == ["mirrored"] * 3


def test_signatures_that_cannot_be_looked_at_are_no_news(home, tmp_path):
    """A disk that cannot be listed for a moment neither ends the daemon nor has everything mirrored again."""
    shared = Sharing(
        home / "serving", Config(mirror=MirrorConfig(url=str(tmp_path / "mirror"))), lambda *_, **__: None
    )
    tick_until(shared, shared.is_done)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        time.sleep(1.1)  # until it looks again
        assert shared.is_done()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def tick_until(shared, is_so):
    """Tick as the daemon does."""
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        shared.tick()
        time.sleep(0.02)


def test_trouble_with_sharing_stops_nothing_and_is_tried_again(bench, tmp_path):
    """The mirror's place is a file: the batch is published all the same, and the status says why."""
    bench.service.stop()
    place = tmp_path / "mirror"
    place.write_text("in the way")
    bench.config = bench.config.model_copy(update={"mirror": MirrorConfig(url=str(place))})
    bench.new_service().start()
    bench.drop("cups")
    bench.tick_until(lambda: bench.store.current() == 1)
    bench.tick_until(lambda: bench.service.trouble)

    assert str(place) in bench.service.trouble
    place.unlink()
    bench.now += 1000
    bench.run()
    assert read_pointer(FolderRemote(place)).version == 1
    assert bench.service.trouble is None


def test_a_key_that_cannot_be_used_is_told_at_once(bench):
    """Not at the first publication."""
    config = Config(signing=SigningConfig(key="/nowhere/signing.key"))
    bench.service.stop()
    bench.config = config
    with pytest.raises(Exception, match=r"/nowhere/signing\.key cannot be read"):
        bench.new_service()


def test_places_must_not_depend_on_where_the_daemon_was_started():
    """A relative path in the configuration is refused by name."""
    for section in ({"mirror": {"url": "there"}}, {"triton": {"repository": "models"}}):
        with pytest.raises(ValueError, match="absolute path"):
            Config.model_validate(section)


def test_by_hand_sign_verify_mirror_pull_and_triton(home, dynlora, tmp_path, keys):
    """The commands, one after the other, and what they say to programs."""
    code, _, err = dynlora("--home", home, "verify", "--trust", keys[1])
    assert (code, "is not signed" in err) == (1, True)
    assert dynlora("--home", home, "sign", "--key", keys[0])[1] == "signed 0\n"
    assert dynlora("--home", home, "sign", "--key", keys[0])[1] == "every version is signed already\n"
    assert dynlora("--home", home, "verify", "--trust", keys[1])[0] == 0
    code, out, _ = dynlora("--home", home, "mirror", tmp_path / "mirror", "--json")
    assert (code, json.loads(out)["version"]) == (0, 0)
    code, out, _ = dynlora("pull", tmp_path / "mirror", tmp_path / "edge", "--trust", keys[1], "--json")
    assert (code, json.loads(out)["is_new"]) == (0, True)
    assert "is live here and in" in dynlora("pull", tmp_path / "mirror", tmp_path / "edge")[1]
    code, out, _ = dynlora("pull", tmp_path / "mirror", tmp_path / "edge", "--check")
    assert (code, "files here are as recorded" in out) == (0, True)
    code, out, _ = dynlora("--home", home, "triton", tmp_path / "models", "--json")
    assert (code, json.loads(out)["served"]) == (0, [0])
    code, _, err = dynlora("pull", tmp_path / "nothing", tmp_path / "other")
    assert (code, "is not there" in err) == (1, True)
    code, _, err = dynlora("--home", home, "sign")
    assert (code, "no key to sign with" in err) == (2, True)


def test_a_key_is_replaced_as_the_page_says(home, dynlora, tmp_path, keys, publish_random_version):
    """Readers with both keys, then with the new one alone: a copy that exists, and one made afterwards."""
    make_key = importlib.import_module("tests.deploy.test_signing").make_key
    (old, old_public), (new, new_public) = keys, make_key(tmp_path, "new")
    trusted, source = tmp_path / "trusted.pub", tmp_path / "mirror"
    publish_random_version(home / "serving", 1)

    def pulled(edge):
        """The version that is live in a copy, once what is live here was mirrored and pulled."""
        assert dynlora("--home", home, "mirror", source)[0] == 0
        code, out, err = dynlora("pull", source, tmp_path / edge, "--trust", trusted, "--json")
        assert code == 0, err
        return json.loads(out)["version"]

    trusted.write_bytes(old_public.read_bytes())
    assert dynlora("--home", home, "sign", "--key", old)[1] == "signed 0, 1\n"
    assert pulled("edge") == 1
    trusted.write_bytes(old_public.read_bytes() + new_public.read_bytes())
    assert dynlora("--home", home, "sign", "1", "--key", new)[1] == "signed 1\n"
    assert pulled("edge") == 1
    assert dynlora("--home", home, "sign", "--all", "--key", new)[1] == "signed 0\n"
    code, out, _ = dynlora("--home", home, "sign", "--all", "--key", new)
    assert (code, out) == (0, "every version is signed with this key already\n")
    assert pulled("edge") == 1
    trusted.write_bytes(new_public.read_bytes())

    assert (pulled("edge"), pulled("fresh")) == (1, 1)
    VersionStore(home / "serving").roll_back(to=0, who="ann", why="odd")
    assert (pulled("edge"), pulled("fresh")) == (0, 0)
    with Client(tmp_path / "edge", trust=trusted) as client:
        assert client.version == 0
    code, _, err = dynlora("--home", home, "sign", "0", "--all", "--key", new)
    assert (code, "not both" in err) == (2, True)


def test_a_watching_pull_follows_until_it_is_stopped(home, tmp_path):
    """A process of its own: it takes what is live, survives trouble, and ends at SIGTERM."""
    edge = tmp_path / "edge"
    command = [sys.executable, "-m", "daemon.cli", "pull", str(home / "serving"), str(edge), "--watch", "0.1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (edge / "current").is_symlink():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)

    assert process.returncode == 0
    assert "pulled version=0" in err
    assert VersionStore(edge).current() == 0
