"""A crash before any durable step between report and done loses nothing and does nothing twice."""

import shutil
import time

import pytest

from daemon.exams import load_exams
from deploy import atomic

STEPS = ("write_file", "rename", "replace_symlink", "remove_file", "remove_tree", "make_dir", "fsync_tree")


class Crash(BaseException):
    """The power goes off. Not an Exception: nothing may catch it."""


class PowerCut:
    """Lets `calls` durable steps happen, then none."""

    def __init__(self, calls):
        self.left = calls

    def over(self, function):
        """The step, as long as there is power."""

        def step(*args, **kwargs):
            if self.left == 0:
                raise Crash
            self.left -= 1
            return function(*args, **kwargs)

        return step


@pytest.fixture(params=["published", "held"])
def judged(bench, tmp_path, request):
    """A home at the moment when the worker has ended well: report and staged version are there."""
    bench.behave(exams=[[40, 10, 20, 0]] if request.param == "published" else [[40, 10, 0, 0]])
    bench.drop("cups")
    lifecycle = bench.service._lifecycle
    bench.tick_until(lambda: lifecycle.working is not None)
    while lifecycle._job.worker.poll() is None:
        time.sleep(0.01)
    bench.service.stop()
    copy = tmp_path / "judged"
    shutil.copytree(bench.home, copy, symlinks=True)
    return copy


def restore(bench, judged):
    """Put the home back to that moment."""
    shutil.rmtree(bench.home)
    shutil.copytree(judged, bench.home, symlinks=True)
    bench.new_service()


def cut_power(bench, monkeypatch, calls):
    """Start and tick a service until the power goes; False when there was enough for everything."""
    with monkeypatch.context() as patch:
        cut = PowerCut(calls)
        for name in STEPS:
            patch.setattr(atomic, name, cut.over(getattr(atomic, name)))
        try:
            bench.service.start()
            bench.run()
        except Crash:
            return True
        return False


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.nightly)])
def test_a_power_cut_before_any_durable_step_is_recovered_from(bench, judged, monkeypatch, stride):
    """Cut before step N, start again; the batch ends where it would have ended, once. For N by `stride`."""
    is_held = "[[40, 10, 0, 0]]" in (judged / "behaviour.json").read_text()
    end, versions = ("held", [0]) if is_held else ("done", [0, 1])
    calls = 0
    while True:
        restore(bench, judged)
        was_cut = cut_power(bench, monkeypatch, calls)
        bench.new_service().start()
        bench.run()

        [batch_id] = bench.spool.ids(end)
        assert bench.state() == {end: [batch_id]}, calls
        assert bench.store.versions() == versions, calls
        assert bench.store.current() == versions[-1]
        assert bench.events().count("held" if is_held else "published") == 1, calls
        assert len(list(load_exams(bench.home))) == len(versions) - 1
        assert not list(bench.home.rglob(f"{atomic.TEMPORARY_PREFIX}*")), calls
        assert not list(bench.store.versions_dir.glob(".*")), calls
        if not was_cut:
            break
        calls += stride
    assert calls > (5 if is_held else 10)
