"""kill -9 at any moment: the same weights in the end, nothing lost, nothing twice, no broken version seen."""

import contextlib
import random
import subprocess

import pytest

from daemon.exams import load_exams
from deploy.verify import verify_version
from tests.e2e.conftest import asking, kill, wait_until


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("kills", "seed"),
    [pytest.param(2, 1, id="2-kills"), pytest.param(10, 2, id="10-kills", marks=pytest.mark.nightly)],
)
def test_a_run_that_is_killed_again_and_again_ends_like_an_undisturbed_one(
    e2e_home, undisturbed, kills, seed
):
    """Half of the kills take the daemon alone (its worker must die with it), half its process group."""
    moments = random.Random(seed)
    e2e_home.submit("shoes", "hat")
    e2e_home.submit("tomato", "carrot")
    with asking(e2e_home) as (seen, errors):
        for number in range(kills):
            daemon = e2e_home.start()
            seconds = moments.uniform(0.1, 0.8) * undisturbed.seconds
            with contextlib.suppress(subprocess.TimeoutExpired):  # it is still at work, as meant
                daemon.wait(seconds)
            if daemon.returncode is None:
                kill(daemon, group=number % 2 == 1)
            for version in e2e_home.store.versions():
                verify_version(e2e_home.store.path(version))
        e2e_home.finish()
        wait_until(lambda: seen[-1] == 2 or errors, why=lambda: f"the client is at {seen}")

    submitted = e2e_home.spool.ids("done")
    assert submitted == undisturbed.spool.ids("done")
    assert len(submitted) == 2
    assert e2e_home.weights() == undisturbed.weights()
    assert [entry.batch for entry in e2e_home.store.live_manifest().lineage] == submitted
    assert [exam.batch for _, exam in load_exams(e2e_home.path)] == submitted
    assert not [i for s in ("incoming", "queued", "work", "held", "failed") for i in e2e_home.spool.ids(s)]
    assert errors == []
    assert seen == sorted(set(seen))
