"""`.submitted.json` may come from anybody who can write into the inbox: it is read with care."""

import json
import os
import shutil

import pytest

from daemon.source import read_submitted
from daemon.waiting import find

SECRET = "the secret of another user"


def wrapper(bench, name: str = "submit-0123abcd"):
    """A folder such as `dynlora submit` makes, without its note."""
    bench.class_folder("dress", under=bench.inbox / name)
    return bench.inbox / name


def test_a_link_in_place_of_the_note_is_not_followed(bench, tmp_path) -> None:
    """Else the daemon would quote any file that it may read."""
    (tmp_path / "private.json").write_text(json.dumps({"id": SECRET}))
    (wrapper(bench) / ".submitted.json").symlink_to(tmp_path / "private.json")

    (message,) = bench.settle()

    (batch,) = bench.spool.ids("failed")
    assert "submit-0123abcd/.submitted.json cannot be used: it is a link" in message
    assert SECRET not in message + (bench.spool.path(batch) / "reason.json").read_text()
    assert find(bench.spool, SECRET) is None


def test_a_note_without_end_is_not_read_to_its_end(bench) -> None:
    """One MiB is far more than submit writes."""
    with (wrapper(bench) / ".submitted.json").open("wb") as file:
        file.truncate(1 << 40)

    (message,) = bench.settle()

    assert ".submitted.json cannot be used: it is larger than 1,048,576 bytes; submit it again" in message


def test_a_pipe_in_place_of_the_note_is_not_waited_for(bench) -> None:
    """Nobody may ever write into it."""
    os.mkfifo(wrapper(bench) / ".submitted.json")

    (message,) = bench.settle()

    assert ".submitted.json cannot be used: it is not a regular file" in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (json.dumps({"id": "x", "submitter": [SECRET]}), "submitter: Input should be a valid string"),
        (SECRET, "Invalid JSON"),
        ("{}", "id: Field required"),
    ],
)
def test_a_note_that_is_wrong_is_told_of_and_not_quoted(bench, content: str, told: str) -> None:
    """What is wrong, in one line; not what is in it."""
    (wrapper(bench) / ".submitted.json").write_text(content)

    (message,) = bench.settle()

    assert f"submit-0123abcd/.submitted.json cannot be used: {told}" in message
    assert SECRET not in message
    assert "\n" not in message


def test_a_folder_without_a_note_is_none_of_submits(bench) -> None:
    """Neither is a file."""
    folder = wrapper(bench)

    assert read_submitted(folder) is None
    assert read_submitted(folder / "dress" / "0.png") is None
    shutil.rmtree(folder)
    assert read_submitted(folder) is None


def test_a_wrong_value_in_a_note_is_quoted_in_part(bench) -> None:
    """A message is for reading, and so is the log; a note may be a MiB long."""
    folder = bench.inbox / "spring"
    bench.class_folder("dress", under=folder)
    (folder / "batch.toml").write_text(f"id = {['x' * 1000] * 500}")

    (message,) = bench.settle()

    assert f"spring/batch.toml cannot be used: id is ['{'x' * 78}…; Input should be a valid string" in message
