"""The log of a daemon as its readers get it, from the program itself."""

import json

from tests.daemon.running.conftest import QUICK_TOML, draw_class
from tests.daemon.running.programs import behave, start_daemon


def test_json_lines_name_batch_and_version_wherever_they_apply(home):
    """One batch published, one failed: every line is an object, all lines between know the live version."""
    (home / "config.toml").write_text(f'{QUICK_TOML}[log]\nformat = "json"\n')
    behave(home, fail="no good", retry=False, only=["000002-plates"])
    for name in ("cups", "plates"):
        draw_class(home / "inbox" / name / name)
    daemon = start_daemon(home, once=True)
    _, err = daemon.communicate(timeout=60)

    lines = [json.loads(line) for line in err.splitlines()]
    of_batches = [line for line in lines if line["event"] in ("adapting", "train", "published", "failed")]
    assert daemon.returncode == 1, err
    assert {line["batch"] for line in of_batches} == {"000001-cups", "000002-plates"}
    [published] = [line for line in lines if line["event"] == "published"]
    assert published["version"] == published["live"] == 1
    assert {line["live"] for line in lines[: lines.index(published)]} == {0}
    assert [line["level"] for line in lines if line["event"] == "failed"] == ["error"]
    assert {line["live"] for line in lines[lines.index(published) :]} == {1}
