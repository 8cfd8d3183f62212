"""A store whose graphs another release exported: brought to the installed one, with the same answers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from daemon import cli
from daemon.home import create_home
from deploy import export
from deploy.manifest import GRAPH_NAMES, WEIGHTS_NAME
from deploy.pull import pull
from deploy.rebuild import adopt_rebuild, stage_rebuild
from deploy.remote import open_remote
from deploy.runtime import LoadedVersion
from deploy.store import VersionStore
from deploy.verify import verify_version
from tests.e2e.test_towers import NATIVE, SHORT, TEXT
from tests.e2e.towers import learn_and_publish, publish_founded, write_model

pytestmark = pytest.mark.nightly  # a model is founded, exported for another opset, and exported again
CONFIG = {"embed_dim": 32, "vision_cfg": NATIVE, "text_cfg": TEXT}
PIXELS = np.random.default_rng(0).standard_normal((3, 3, 64, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A home with versions 0 and 1 whose graphs were exported for an earlier opset; only to be copied."""
    home = tmp_path_factory.mktemp("earlier") / "home"
    create_home(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "OPSET", 20)
        store = publish_founded(home, write_model(home.parent / "model", CONFIG))
        learn_and_publish(store, SHORT)
    return home


@pytest.fixture
def home(earlier, tmp_path) -> Path:
    """A home of one's own."""
    shutil.copytree(earlier, tmp_path / "home", symlinks=True)
    return tmp_path / "home"


def dynlora(capsys, *arguments) -> tuple[int, dict]:
    """Run a command in this process; its exit code and document."""
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, arguments), "--json"])
    return ended.value.code, json.loads(capsys.readouterr().out)


def embeddings(store: VersionStore, version: int) -> np.ndarray:
    """What a version says about PIXELS."""
    with LoadedVersion(store.path(version)) as loaded:
        return loaded.encode_pixels(PIXELS)


def test_a_check_says_what_would_be_done_and_changes_nothing(home, capsys):
    """The graphs that differ, with both hashes."""
    before = sorted(path.name for path in (home / "serving" / "versions").iterdir())
    code, found = dynlora(capsys, "migrate", "--check", "--home", home)

    assert code == 0
    assert (found["is_current"], found["version"], sorted(found["graphs"])) == (
        False,
        None,
        sorted(GRAPH_NAMES),
    )
    assert sorted(path.name for path in (home / "serving" / "versions").iterdir()) == before
    assert VersionStore(home / "serving").current() == 1


def test_the_same_weights_go_live_under_todays_graphs_and_all_goes_on(home, tmp_path, capsys):
    """Same answers; a second time there is nothing to do; a pull, a roll-back, a thin and a rebuild go on."""
    remote = open_remote(str(home / "serving"))
    pull(remote, tmp_path / "edge")
    code, found = dynlora(capsys, "migrate", "--why", "torch went on", "--home", home)
    assert (code, found["version"]) == (0, 2)

    store = VersionStore(home / "serving")
    old, new = store.manifest(1), store.manifest(2)
    assert (new.kind, new.lineage, new.files[WEIGHTS_NAME]) == (
        "regraph",
        old.lineage,
        old.files[WEIGHTS_NAME],
    )
    assert all(new.files[name] != old.files[name] for name in GRAPH_NAMES)
    assert "torch went on" in new.decision.rules[0].detail
    verify_version(store.path(2))
    np.testing.assert_allclose(embeddings(store, 2), embeddings(store, 1), atol=2e-6)
    assert "regraphed" in (home / "events.jsonl").read_text()
    for command in ("versions", "show", "status", "verify"):
        assert dynlora(capsys, command, "--home", home)[0] == 0

    code, found = dynlora(capsys, "migrate", "--home", home)
    assert (code, found["is_current"], found["version"]) == (0, True, None)

    assert pull(remote, tmp_path / "edge").version == 2
    np.testing.assert_array_equal(embeddings(VersionStore(tmp_path / "edge"), 2), embeddings(store, 2))

    store.roll_back(to=1, who="test", why="no reason")
    store.unpin("test")
    code, found = dynlora(capsys, "migrate", "--home", home)
    assert (code, found["version"]) == (0, 3)
    expected = embeddings(store, 2)
    assert dynlora(capsys, "thin", "2", "--home", home)[0] == 0
    assert not store.is_full(2)
    stage_rebuild(store, 2)
    adopt_rebuild(store, 2)
    np.testing.assert_array_equal(embeddings(store, 2), expected)


def test_a_pinned_version_is_left_alone(home, capsys):
    """Whoever pinned it does not want another one live."""
    store = VersionStore(home / "serving")
    store.roll_back(to=0, who="test", why="no reason")
    code, found = dynlora(capsys, "migrate", "--home", home)

    assert code == 1
    assert "pinned by test" in found["error"]
