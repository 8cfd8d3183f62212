"""From drop to live: what the figures are made of, and that a batch that fails ends the measurement."""

import json
from datetime import UTC, datetime

import pytest

from benchmarks import stages

SECONDS = {"load": 1.0, "score": 2.0, "train": 100.0, "fold": 3.0}


def tell(home, at, event, **fields):
    """Append one event, at so many seconds."""
    moment = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    with (home / "events.jsonl").open("a") as file:
        file.write(json.dumps({"at": moment, "event": event, **fields}) + "\n")


@pytest.fixture
def home(tmp_path):
    """A home in which a batch was learnt."""
    result = tmp_path / "spool" / "done" / "000001-hats" / "result"
    result.mkdir(parents=True)
    (result / "report.json").write_text(json.dumps({"seconds": SECONDS, "peak_memory_bytes": 5}))
    for at, event in ((1000.0, "started"), (1010.5, "queued"), (1011.0, "adapting")):
        tell(tmp_path, at, event)
    return tmp_path


def of(home, event):
    """The event of that name."""
    return next(told for told in stages.events(home) if told["event"] == event)


def test_training_is_taken_out_of_a_published_batch(home):
    """What lies between the worker's stages and the switch of `current` is its start and publishing."""
    tell(home, 1119.0, "published", version=1)
    recorded = of(home, "published")
    moments = stages.Moments(dropped=1010.0, ordered=1119.0, live=1118.5)
    found = stages.stage_seconds(home, recorded, recorded, moments)
    assert found["worker start and publishing"] == pytest.approx(1.5)
    assert found["drop to live minus training"] == pytest.approx(8.5)
    assert found["live to recorded"] == pytest.approx(0.5)


def test_a_promotion_counts_on_top_of_a_held_batch(home):
    """From the order to the switch; the time between decision and order does not count."""
    tell(home, 1119.0, "held", batch="000001-hats")
    tell(home, 1150.0, "promoted", version=1)
    moments = stages.Moments(dropped=1010.0, ordered=1143.0, live=1149.5)
    found = stages.stage_seconds(home, of(home, "held"), of(home, "promoted"), moments)
    assert found["drop to held minus training"] == pytest.approx(9.0)
    assert found["promotion"] == pytest.approx(6.5)
    assert found["drop to live minus training"] == pytest.approx(15.5)


@pytest.mark.parametrize("event", ["attempt_failed", "failed", "discarded"])
def test_a_batch_that_fails_ends_the_measurement(home, event):
    """With what the daemon said."""
    tell(home, 1119.0, event, why="the disk is full")
    with pytest.raises(RuntimeError, match=f"not published but {event}: the disk is full"):
        stages.told_event(home, ["published", "held"])


def test_an_event_that_was_not_told_yet_is_waited_for(home):
    """Nothing is found, and nothing is wrong."""
    assert stages.told_event(home, ["published", "held"]) is None
