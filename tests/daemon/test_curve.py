"""The course of training on disk: every step once, whatever a crash tore."""

import pytest

from daemon.adaptation import _noted_for_mlflow
from daemon.config import Config
from daemon.curve import CURVE_NAME, CurveWriter, Point, read_curve
from dynlora.learner import Hooks, Progress


def steps(directory):
    """(step, loss) of what is on disk."""
    return [(point.step, point.loss) for point in read_curve(directory)]


def test_a_resume_replaces_the_steps_that_it_makes_again(tmp_path):
    """Killed at step 5 with a checkpoint of step 3, in the middle of a line."""
    writer = CurveWriter(tmp_path, is_new=True)
    for step in range(1, 6):
        writer.add(Point(step, 1.0 / step, 4.0, 1000.0 + step))
    path = tmp_path / CURVE_NAME
    path.write_bytes(path.read_bytes()[:-7])
    writer = CurveWriter(tmp_path, is_new=False)
    for step in (4, 5, 6):
        writer.add(Point(step, float(step), 3.5, 2000.0))

    assert steps(tmp_path) == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 4.0), (5, 5.0), (6, 6.0)]


def test_what_starts_over_keeps_nothing_of_before(tmp_path):
    """Fewer steps by another plan: no tail of the old curve is left."""
    for count in (3, 2):
        writer = CurveWriter(tmp_path, is_new=True)
        for step in range(1, count + 1):
            writer.add(Point(step, float(count), 4.0, 0.0))

    assert steps(tmp_path) == [(1, 2.0), (2, 2.0)]
    assert read_curve(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("is_new", [True, False])
def test_a_curve_that_cannot_be_written_stops_nobody(tmp_path, is_new):
    """Learning goes on, and does not try again with every step."""
    (tmp_path / CURVE_NAME).mkdir()
    writer = CurveWriter(tmp_path, is_new=is_new)
    writer.add(Point(1, 1.0, 4.0, 0.0))

    assert list((tmp_path / CURVE_NAME).iterdir()) == []


def test_the_worker_writes_every_step_and_still_says_it(tmp_path):
    """What is said is thinned out, what is written is not; nothing is written where nobody reads it."""
    said = []
    for uri, written in (("", []), ("http://127.0.0.1:9", [(1, 0.5), (2, 0.5), (3, 0.5)])):
        config = Config.model_validate({"mlflow": {"tracking_uri": uri}})
        hooks = _noted_for_mlflow(Hooks(on_progress=said.append), tmp_path, config)
        for step in (1, 2, 3):
            hooks.on_progress(Progress(step, 3, 0.5, 4.0))

        assert steps(tmp_path) == written
    assert [progress.step for progress in said] == [1, 2, 3] * 2
