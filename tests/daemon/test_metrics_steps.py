"""Training steps are counted once each, from a status that is looked at now and then."""

from typing import Any

import pytest

from daemon.metrics import Metrics
from daemon.spool import Spool
from deploy.store import VersionStore


def train(step: int, batch: str = "a") -> dict[str, Any]:
    """The status of a batch of ten steps."""
    return {"batch": batch, "phase": "train", "step": step, "steps": 10}


@pytest.mark.parametrize(
    ("seen", "counted"),
    [
        ([train(2), train(7), train(10), {"batch": "a", "phase": "fold"}], 8),
        ([train(1), train(7), {"batch": "a", "phase": "exam"}, {}], 9),
        ([train(1), train(7), {}, train(7), train(10)], 9),
        ([train(4), {"batch": "b", "phase": "fold"}, train(3, "b"), train(4, "b")], 4),
        ([{"batch": "a", "phase": "fold"}, {"batch": "a", "phase": "verify"}], 0),
    ],
    ids=["to the end", "the end unseen", "paused and gone on with", "another batch", "never seen training"],
)
def test_every_step_since_the_first_look_is_counted_once(tmp_path, seen, counted) -> None:
    """Of a batch that was training at the first look, what came before may be counted already."""
    metrics = Metrics(Spool(tmp_path), VersionStore(tmp_path / "serving"), "test")
    for working in seen:
        metrics.count_steps(working)

    assert metrics.registry.get_sample_value("dynlora_train_steps_total") == counted
