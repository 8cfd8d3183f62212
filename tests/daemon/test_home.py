"""Homes are made once and recognised; the state that is told comes from their files."""

import json

import pytest

from daemon.errors import ConfigError, WorkerError
from daemon.home import check_home, create_home, names_in, unmade_where_it_fails
from daemon.retention import remove_leftovers
from daemon.status import StatusFile, is_full_disk, snapshot


def test_making_a_home_twice_harms_nothing(tmp_path):
    """`init` that was cut short is simply run again."""
    home = tmp_path / "a" / "home"
    create_home(home)
    (home / "inbox" / "cups").mkdir()
    create_home(home)
    check_home(home)

    assert (home / "inbox" / "cups").is_dir()
    assert {"inbox", "spool", "exams", "requests", "serving", "format"} <= {p.name for p in home.iterdir()}


def make_and_fail(home, error):
    """As `dynlora init` does, whose worker leaves a log and half a version."""
    before = names_in(home)
    create_home(home)
    (home / "serving" / "staging" / "initial").mkdir(parents=True)
    (home / "worker.log").write_text("Traceback")
    with pytest.raises(type(error)), unmade_where_it_fails(home, before):
        raise error


@pytest.mark.parametrize("error", [ConfigError("no such model"), KeyboardInterrupt()])
def test_a_home_that_could_not_be_made_is_gone_again(tmp_path, error):
    """As whole as it was made; the same path is tried again."""
    make_and_fail(tmp_path / "home", error)

    assert list(tmp_path.iterdir()) == []


def test_the_log_of_a_worker_that_failed_for_no_known_reason_stays(tmp_path):
    """It may be all there is to find out why; the folder is no home nevertheless."""
    make_and_fail(tmp_path / "home", WorkerError("it died"))

    assert [path.name for path in (tmp_path / "home").iterdir()] == ["worker.log"]
    create_home(tmp_path / "home")


def test_what_others_put_beside_or_into_a_home_that_could_not_be_made_stays(tmp_path):
    """Files that lay there, an inbox with something in it, and a home that was one before."""
    (tmp_path / "config.toml").write_text("")
    before = names_in(tmp_path)
    create_home(tmp_path)
    (tmp_path / "inbox" / "cups").mkdir()
    (tmp_path / "theirs").write_text("")
    with pytest.raises(ConfigError), unmade_where_it_fails(tmp_path, before):
        raise ConfigError("no such model")
    assert {path.name for path in tmp_path.iterdir()} == {"config.toml", "inbox", "theirs"}

    create_home(tmp_path)
    make_and_fail(tmp_path, ConfigError("no such model"))
    check_home(tmp_path)


def test_a_file_in_the_way_is_told(tmp_path):
    """Expected a directory, found a file."""
    (tmp_path / "home").write_text("")

    with pytest.raises(ConfigError, match="is a file; expected a directory"):
        create_home(tmp_path / "home")


def test_a_directory_that_is_no_home_is_told_with_what_to_do(tmp_path):
    """Commands do not work in any directory that happens to be there."""
    with pytest.raises(ConfigError, match=r"no dynlora home.*dynlora init"):
        check_home(tmp_path)


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ("7", "format '7', and this release of dynlora knows '1': a newer one has used it"),
        ("0", "format '0', expected '1'"),
        ("seven", "format 'seven', expected '1'"),
    ],
)
def test_a_home_of_another_release_is_left_alone(tmp_path, found, sentence):
    """Neither used nor changed; a newer one is told from one that nobody knows."""
    create_home(tmp_path)
    (tmp_path / "format").write_text(f"{found}\n")

    for function in (check_home, create_home):
        with pytest.raises(ConfigError, match=sentence):
            function(tmp_path)
    assert (tmp_path / "format").read_text() == f"{found}\n"


def test_the_status_of_an_empty_home_says_what_is_missing(tmp_path):
    """No daemon, no version, and what to do about it."""
    create_home(tmp_path)
    found = snapshot(tmp_path)

    assert (found["daemon"], found["state"], found["live"]) == (None, "stopped", None)
    assert "dynlora init" in found["live_error"]


def test_the_status_file_is_written_four_times_a_second_at_most_while_steps_pass(tmp_path):
    """Progress may be dropped; a change that matters is written at once."""
    now = [0.0]
    status = StatusFile(tmp_path, clock=lambda: now[0])
    read = lambda: json.loads((tmp_path / "status.json").read_text())["step"]  # noqa: E731

    status.write({"step": 1}, now_or_later=True)
    status.write({"step": 2}, now_or_later=True)
    assert read() == 1
    status.write({"step": 3})
    assert read() == 3
    now[0] = 0.3
    status.write({"step": 4}, now_or_later=True)
    assert read() == 4


def test_a_status_that_cannot_be_written_does_not_stop_the_daemon(tmp_path):
    """It is a convenience; the directory is gone here, the disk might be full elsewhere."""
    StatusFile(tmp_path / "gone").write({"step": 1})


def test_a_full_disk_is_recognised_through_the_error_that_wraps_it():
    """Publishing wraps the operating system's refusal in its own sentence."""
    wrapped = RuntimeError("could not be published")
    wrapped.__cause__ = OSError(28, "No space left on device")

    assert is_full_disk(wrapped)
    assert is_full_disk(OSError(122, "Disk quota exceeded"))
    assert not is_full_disk(OSError(2, "No such file"))


def test_leftovers_of_writes_cut_short_are_removed_at_start(tmp_path):
    """Half-written files outside spool and store; requests that wait stay."""
    create_home(tmp_path)
    (tmp_path / ".tmp-status.json-1-2").write_text("{")
    (tmp_path / "requests" / ".tmp-x").write_text("{")
    (tmp_path / "exams" / ".tmp-000001-cups").mkdir()
    (tmp_path / "requests" / "1-2-3.json").write_text("{}")

    remove_leftovers(tmp_path)

    assert not list(tmp_path.rglob(".tmp-*"))
    assert (tmp_path / "requests" / "1-2-3.json").exists()
