"""Every message that docs/operations.md lists is what is said when that is dropped, configured or typed."""

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon import cli
from daemon.batch import Batch
from daemon.config_sources import load_config
from daemon.errors import ConfigError
from daemon.home import create_home
from tests.daemon.bad_drops import DROPS, LIMITS
from tests.deploy.tiny import found_tiny, stage_update

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
ROW = re.compile(r"^\| (.+?) \| (.+?) \|$")


def listed() -> dict[str, dict[str, str]]:
    """The tables of the section: heading of the first column → what → message."""
    section = PAGE.read_text().split("## What is refused, and in which words")[1].split("\n## ")[0]
    found: dict[str, dict[str, str]] = {}
    for table in re.split(r"\n\n", section):
        lines = table.splitlines()
        if lines and (head := ROW.match(lines[0])):
            found[head[1]] = {
                row[1].strip("`"): row[2] for line in lines[2:] if (row := ROW.match(line)) is not None
            }
    return found


TABLES = listed()
DROPPED = {
    what: message
    for head, rows in TABLES.items()
    if head.startswith("dropped")
    for what, message in rows.items()
}


def is_said(message: str, said: str) -> bool:
    """Whether a listed message is what was said, whatever stands for its gaps."""
    return bool(re.fullmatch(".*".join(re.escape(part) for part in message.split("…")), said, re.DOTALL))


def test_every_listed_drop_is_tried() -> None:
    """And none is tried that is not listed."""
    assert DROPPED.keys() == DROPS.keys()
    assert len(TABLES["in config.toml"]) > 15
    assert len(TABLES["typed"]) > 15


@pytest.mark.parametrize("what", DROPS)
def test_a_bad_drop_is_answered_in_the_listed_words(make_bench, tmp_path: Path, what: str) -> None:
    """By the event, or among the details of reason.json or the files set aside."""
    bench = make_bench(tmp_path, **LIMITS)
    DROPS[what](bench)
    said = [event.message for _ in range(20) for event in bench.step(60)]
    for batch in bench.spool.ids("failed"):
        reason = bench.spool.reason(batch)
        said += [reason.reason, *reason.details]
    said += [aside.sentence for batch in bench.spool.batches() for aside in batch.set_aside]

    assert any(is_said(DROPPED[what], sentence) for sentence in said), said


@pytest.mark.parametrize("line", TABLES["in config.toml"])
def test_a_bad_configuration_is_answered_in_the_listed_words(tmp_path: Path, line: str) -> None:
    """File, key, value, what was expected; and no other complaint."""
    (tmp_path / "spool").mkdir()
    (tmp_path / "config.toml").write_text(line)

    with pytest.raises(ConfigError) as refused:
        load_config(None, tmp_path)

    assert str(refused.value).startswith(str(tmp_path / "config.toml"))
    assert is_said(TABLES["in config.toml"][line], str(refused.value)), str(refused.value)


@pytest.mark.parametrize("setting", TABLES["in the environment"])
def test_a_bad_variable_is_answered_in_the_listed_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """Variable, key, value, what was expected."""
    name, _, value = setting.partition("=")
    monkeypatch.setenv(name, value)

    with pytest.raises(ConfigError) as refused:
        load_config(None, tmp_path)

    assert is_said(TABLES["in the environment"][setting], str(refused.value)), str(refused.value)


@pytest.fixture
def somebody_else(place: Path) -> Iterator[None]:
    """This process may do no more than a user who does not own the home."""
    import daemon.loop
    import daemon.ordering
    import daemon.status
    import daemon.watcher  # noqa: F401 - whoever is nobody may not be allowed to load them

    lock, locked = place / "home" / "daemon.lock", place / "locked"
    lock.touch()
    locked.mkdir(exist_ok=True)
    lock.chmod(0)
    locked.chmod(0)
    place.chmod(0o755)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)
    lock.chmod(0o644)
    locked.chmod(0o755)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a home of two versions, a published and a queued batch, and things to submit."""
    folder = tmp_path_factory.mktemp("place")
    home = folder / "home"
    create_home(home)
    store = found_tiny(home / "serving")
    store.publish(*stage_update(store, "000001-cup", ["cup"]))
    for seq, (batch, state) in enumerate((("000001-cup", "done"), ("000002-hat", "queued")), 1):
        record = Batch(
            id=batch, seq=seq, slug="x", kind="batch", received_at="2026-01-01T00:00:00+00:00",
            content_sha256=f"{seq:064d}", classes=[], images=[],
        )  # fmt: skip
        (home / "spool" / state / batch).mkdir()
        (home / "spool" / state / batch / "batch.json").write_text(record.to_json())
    (folder / "letter.txt").write_text("x")
    (folder / "nothing").mkdir()
    (folder / "photos" / "cup").mkdir(parents=True)
    (folder / "photos" / "cup" / "0.jpg").write_bytes(b"x")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def last_words(typed: str, capsys, monkeypatch) -> tuple[object, str, str]:
    """Exit code, stdout and the last line of stderr of a command that is typed beside `home`."""
    monkeypatch.setenv("DYNLORA_HOME", "home")
    monkeypatch.delenv("DYNLORA_CONFIG", raising=False)
    program, *arguments = shlex.split(typed)
    assert program == "dynlora"
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return ended.value.code, out, err.strip().splitlines()[-1]


@pytest.mark.parametrize("typed", TABLES["typed by another user"])
@pytest.mark.usefixtures("somebody_else")
def test_another_user_is_told_whose_home_it_is(typed: str, capsys, monkeypatch) -> None:
    """And how to become that user, in the listed words; nothing is changed."""
    code, out, err = last_words(typed, capsys, monkeypatch)

    assert code in (1, 2)
    assert out == ""
    assert is_said(f"Error: {TABLES['typed by another user'][typed]}", err), err
    assert f"`sudo -u {Path('home').owner()} …`" in err


@pytest.mark.parametrize("typed", TABLES["typed"])
@pytest.mark.usefixtures("place")
def test_a_bad_command_is_answered_in_the_listed_words(typed: str, capsys, monkeypatch) -> None:
    """On stderr, as one sentence; the exit code says whose mistake it was."""
    code, out, err = last_words(typed, capsys, monkeypatch)

    assert is_said(f"Error: {TABLES['typed'][typed]}", err), err
    assert out == ""
    usage = ("no dynlora home", "a home already", "--config", "--key", "--pretrained", "with -o")
    assert code == (2 if any(words in err for words in usage) else 1)
