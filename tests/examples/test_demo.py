"""The demo touches nothing that is not its own, and its configuration is a valid one."""

from pathlib import Path

import demo
import pytest

from daemon.config_sources import read_config
from daemon.lock import HomeLock


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's home is relative to where it is started."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def old_home() -> Path:
    """What an earlier demo left."""
    (demo.HOME / "serving").mkdir(parents=True)
    (demo.HOME / "format").write_text("1\n")
    return demo.HOME


def test_an_earlier_home_is_removed(old_home: Path) -> None:
    """Every demo starts afresh."""
    demo.fresh_home()

    assert not old_home.exists()


def test_a_folder_that_is_no_home_is_left_alone() -> None:
    """Somebody's own demo-home keeps its files, and the message says what to do."""
    precious = demo.HOME / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("all of it")

    with pytest.raises(demo.DemoError, match=r"is not a dynlora home\. Move it away"):
        demo.fresh_home()

    assert precious.read_text() == "all of it"


def test_a_home_in_use_is_left_alone(old_home: Path) -> None:
    """A daemon that still runs keeps its home."""
    with HomeLock(old_home), pytest.raises(demo.DemoError, match=r"a daemon .* is running"):
        demo.fresh_home()

    assert (old_home / "format").exists()


def test_the_configuration_is_valid(tmp_path: Path) -> None:
    """A renamed key is found here rather than in front of a newcomer."""
    path = tmp_path / "config.toml"
    path.write_text(demo.CONFIG)

    assert read_config(path).inbox.gather_seconds == 2.0


def test_a_failing_command_is_told_with_its_words() -> None:
    """The demo passes on what `dynlora` said."""
    with pytest.raises(demo.DemoError, match=r"`dynlora submit nowhere` ended with 2: .*no dynlora home"):
        demo.dynlora("submit", "nowhere")
