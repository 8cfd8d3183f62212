"""The plan on disk: kept and obeyed by the next attempt, dropped with its checkpoint when it does not fit."""

import pytest

from daemon.plan import PLAN_NAME, settle_plan, step_reached, stored_plan
from dynlora.checkpoint import pack
from dynlora.settings import preset
from tests.daemon.plans import PLAN


def test_a_settled_plan_is_obeyed_where_the_next_attempt_would_choose_otherwise(tmp_path):
    """The dtype that a trial chose, threads and settings are those of the first attempt."""
    chosen = PLAN.model_copy(update={"dtype": "bfloat16"})
    settle_plan(tmp_path, chosen).write_bytes(b"half way")
    wanted = PLAN.model_copy(update={"threads": 8, "settings": {"rank": 4}})
    stored = stored_plan(tmp_path, wanted)

    assert stored == chosen
    assert settle_plan(tmp_path, stored).read_bytes() == b"half way"


@pytest.mark.parametrize("field", ["content_sha256", "parent_weights_sha256", "moments_sha256", "software"])
def test_a_plan_that_does_not_fit_goes_with_its_checkpoint(tmp_path, field):
    """Other images, another parent, other moments or software: nothing of before may be continued."""
    checkpoint = settle_plan(tmp_path, PLAN)
    checkpoint.write_bytes(b"of another run")
    other = PLAN.model_copy(update={field: {"torch": "3"} if field == "software" else "d" * 64})

    assert stored_plan(tmp_path, other) is None
    assert not settle_plan(tmp_path, other).exists()
    assert stored_plan(tmp_path, other) == other


def test_a_plan_that_cannot_be_read_is_none(tmp_path):
    """Another release wrote it, or the disk did."""
    (tmp_path / PLAN_NAME).write_text("{}")

    assert stored_plan(tmp_path, PLAN) is None


def test_the_step_of_a_checkpoint_is_read_without_torch(tmp_path):
    """How far learning had come says whether an attempt that was killed got anywhere."""
    assert step_reached(tmp_path) == 0
    checkpoint = settle_plan(tmp_path, PLAN)
    assert step_reached(tmp_path) == 0
    checkpoint.write_bytes(pack([], {}, step=31, loss=0.5, seed=1, settings=preset("default")))
    assert step_reached(tmp_path) == 31
    checkpoint.write_bytes(b"damaged")
    assert step_reached(tmp_path) == 0
