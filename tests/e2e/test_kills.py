"""kill -9 at any moment: the same weights in the end, nothing lost, nothing twice, no broken version seen."""

import contextlib
import random
import shutil
import subprocess

import pytest

from daemon.exams import load_exams
from deploy.verify import verify_version
from tests.e2e.conftest import Home, asking, kill, wait_until


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("kills", "seed"),
    [pytest.param(1, 1, id="1-kill"), pytest.param(10, 2, id="10-kills", marks=pytest.mark.nightly)],
)
def test_a_run_that_is_killed_again_and_again_ends_like_an_undisturbed_one(
    initialised, undisturbed, tmp_path, kills, seed
):
    """Half of the kills take the daemon alone (its worker must die with it), half its process group.

    A life that ends before it was killed often enough is followed by another; all must end alike.
    """
    moments = random.Random(seed)
    done, life = 0, 0
    while done < kills:
        life += 1
        home = Home(shutil.copytree(initialised, tmp_path / str(life) / "home", symlinks=True))
        done = live(home, undisturbed, moments, range(done, kills))
    print(f"{done} kills in {life} lives")
    assert done == kills


def live(home, undisturbed, moments, numbers):
    """Two batches, killed at random moments, even numbers the daemon alone; the number of kills so far."""
    home.submit("shoes", "hat")
    home.submit("tomato", "carrot")
    done = numbers.start
    with asking(home) as (seen, errors):
        for number in numbers:
            daemon = home.start()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it is still at work, as meant
                daemon.wait(moments.uniform(0.05, 0.5) * undisturbed.seconds)
            if daemon.returncode is not None:
                break
            kill(daemon, group=number % 2 == 1)
            done += 1
            for version in home.store.versions():
                verify_version(home.store.path(version))
        home.finish()
        wait_until(lambda: seen[-1] == 2 or errors, why=lambda: f"the client is at {seen}")
    check_like(home, undisturbed)
    assert errors == []
    assert seen == sorted(set(seen))
    return done


def check_like(home, undisturbed):
    """The same versions, every batch learnt once, nothing left over."""
    submitted = home.spool.ids("done")
    assert submitted == undisturbed.spool.ids("done")
    assert len(submitted) == 2
    assert home.weights() == undisturbed.weights()
    assert [entry.batch for entry in home.store.live_manifest().lineage] == submitted
    assert [exam.batch for _, exam in load_exams(home.path)] == submitted
    assert not [i for s in ("incoming", "queued", "work", "held", "failed") for i in home.spool.ids(s)]
