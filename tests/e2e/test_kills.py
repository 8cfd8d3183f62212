"""kill -9 at any moment: the same weights in the end, nothing lost, nothing twice, no broken version seen."""

import contextlib
import os
import random
import shutil
import subprocess
import time

import pytest

from daemon.exams import load_exams
from deploy.verify import verify_version
from tests.e2e.conftest import DYNLORA, ROOT, Home, asking, environment, kill, wait_until
from tests.e2e.test_towers import NATIVE, TEXT
from tests.e2e.towers import write_model


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("kills", "seed"),
    [pytest.param(1, 1, id="1-kill"), pytest.param(10, 2, id="10-kills", marks=pytest.mark.nightly)],
)
def test_a_run_that_is_killed_again_and_again_ends_like_an_undisturbed_one(
    initialised, undisturbed, tmp_path, kills, seed
):
    """A third of the kills take the daemon alone (its worker must die with it), the others its process group.

    A life that ends before it was killed often enough is followed by another; all must end alike.
    """
    kill_often(initialised, undisturbed, tmp_path, kills, seed)


@pytest.mark.nightly
@pytest.mark.timeout(14400)
def test_ten_batches_are_learnt_once_each_however_often_the_daemon_is_killed(
    initialised, undisturbed_ten, tmp_path
):
    """200 kills, or DYNLORA_KILLS; which part of a batch they hit is left to chance."""
    kill_often(initialised, undisturbed_ten, tmp_path, int(os.environ.get("DYNLORA_KILLS", "200")), 3)


@pytest.mark.nightly
def test_an_init_that_is_killed_is_told_as_that_and_the_next_one_makes_the_home_whole(tmp_path):
    """Killed while version 0 is made: not taken for a home that works, and nothing has to be removed."""
    small = {"embed_dim": 32, "vision_cfg": NATIVE, "text_cfg": TEXT}
    model = f"local-dir:{write_model(tmp_path / 'model', small)}"
    path = tmp_path / "home"
    begun = subprocess.Popen(
        [*DYNLORA, "init", str(path), "--model", model],
        cwd=ROOT, stderr=subprocess.DEVNULL, env=environment(), start_new_session=True,
    )  # fmt: skip
    wait_until(lambda: list(path.glob("serving/versions/.*")))
    kill(begun, group=True)
    home = Home(path)
    assert home.store.versions() == []

    looked, ran = home.dynlora("status"), home.dynlora("run", "--once")
    again = home.dynlora("init", path, "--model", model)

    assert "holds no version yet. Run `dynlora init` first." in looked.stdout
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "holds no version yet. Run `dynlora init` first." in ran.stderr
    assert again.returncode == 0, again.stderr
    assert home.dynlora("verify").returncode == 0
    assert [entry.name for entry in home.store.versions_dir.iterdir()] == ["0"]
    assert not list(path.rglob(".tmp-*"))
    assert home.finish()["outcomes"] == []


@pytest.fixture(scope="module")
def undisturbed_ten(initialised, tmp_path_factory):
    """Ten small batches learnt without any trouble."""
    home = Home(shutil.copytree(initialised, tmp_path_factory.mktemp("ten") / "home", symlinks=True))
    home.batches = [
        (name,)
        for name in "shoes hat tomato carrot dress pants shorts t-shirt yoghurt zucchini".split()  # noqa: SIM905
    ]
    first, *others = home.batches
    home.steps = 4
    home.configure(steps=home.steps)
    home.submit(*first)
    started = time.monotonic()
    home.finish()
    home.longest_seconds = 1.2 * (time.monotonic() - started)
    for classes in others:
        home.submit(*classes)
    home.finish(timeout=600)
    return home


def kill_often(initialised, undisturbed, tmp_path, kills, seed):
    """Live the same batches as often as it takes for that many kills."""
    moments = random.Random(seed)
    done, life = 0, 0
    started = time.monotonic()
    while done < kills:
        life += 1
        home = Home(shutil.copytree(initialised, tmp_path / str(life) / "home", symlinks=True))
        done = live(home, undisturbed, moments, range(done, kills))
        shutil.rmtree(home.path)
        print(f"{done} kills in {life} lives, {time.monotonic() - started:.0f} s", flush=True)
    assert done == kills


def live(home, undisturbed, moments, numbers):
    """All batches, killed at random moments, each third time the daemon alone; the number of kills so far."""
    home.configure(steps=undisturbed.steps)
    for classes in undisturbed.batches:
        home.submit(*classes)
    done = numbers.start
    with asking(home, 0.02 if len(undisturbed.batches) < 3 else 0.2) as (seen, errors):
        for number in numbers:
            daemon = home.start()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it is still at work, as meant
                daemon.wait(moments.uniform(0.05, 1.0) * undisturbed.longest_seconds)
            if daemon.returncode is not None:
                break
            kill(daemon, group=number % 3 != 0)
            done += 1
            print(f"kill {done}: versions {home.store.versions()}", flush=True)
            for version in home.store.full_versions()[-2:]:
                verify_version(home.store.path(version))
        home.finish(timeout=600)
        wait_until(
            lambda: seen[-1] == len(undisturbed.batches) or errors, why=lambda: f"the client is at {seen}"
        )
    check_like(home, undisturbed)
    assert errors == []
    assert seen == sorted(set(seen))
    return done


def check_like(home, undisturbed):
    """The same versions, every batch learnt once, nothing left over."""
    submitted = home.spool.ids("done")
    assert submitted == undisturbed.spool.ids("done")
    assert len(submitted) == len(undisturbed.batches)
    assert home.weights() == undisturbed.weights()
    assert [entry.batch for entry in home.store.live_manifest().lineage] == submitted
    assert [exam.batch for _, exam in load_exams(home.path)] == submitted
    assert not [i for s in ("incoming", "queued", "work", "held", "failed") for i in home.spool.ids(s)]
