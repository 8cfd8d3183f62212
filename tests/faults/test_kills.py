"""Ten submitted batches, and kill -9 at random moments: each is learnt once, and the weights are the same.

The daemon, its store and the fold are the real ones; its workers are real processes that learn in no time
(tests/faults/life.py), so that hundreds of kills take minutes. With the real worker: tests/e2e/test_kills.py.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from daemon import child, worker
from daemon.claim import read_claim
from daemon.errors import InboxError
from daemon.home import create_home
from daemon.spool import Spool
from daemon.submit import submit
from daemon.taking import MAX_CRASHES
from tests.deploy.tiny import found_tiny
from tests.faults import life

BATCHES = 10


@pytest.fixture(scope="module")
def submitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with ten batches in its inbox; only to be copied."""
    base = tmp_path_factory.mktemp("submitted")
    create_home(base / "home")
    found_tiny(base / "home" / "serving")
    for number in range(BATCHES):
        batch = base / f"batch-{number}"
        life.draw_batch(batch, f"class {number}", number)
        submit(batch, base / "home" / "inbox", producer_id=f"batch-{number}")
    return base / "home"


@pytest.fixture(scope="module")
def undisturbed(submitted: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    """What the ten end with, and how many seconds they take."""
    home = copied(submitted, tmp_path_factory.mktemp("undisturbed"))
    started = time.monotonic()
    life.live_in_child(home)
    seconds = time.monotonic() - started
    life.check_visible(home, BATCHES)
    found = life.outcome(home)
    assert found["versions"] == list(range(BATCHES + 1))
    assert len(found["states"]["done"]) == BATCHES
    return found, seconds


def copied(home: Path, base: Path) -> Path:
    """A home like this one; copies of entries arrive in the order of the originals."""
    shutil.copytree(home, base / "home", symlinks=True)
    return base / "home"


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("kills", "seed"),
    [pytest.param(8, 1, id="8-kills"), pytest.param(200, 2, id="200-kills", marks=pytest.mark.nightly)],
)
def test_ten_batches_are_learnt_once_each_however_often_the_daemon_is_killed(
    submitted: Path, undisturbed: tuple[dict[str, Any], float], room: Path, kills: int, seed: int
) -> None:
    """Every third kill takes the daemon alone, and its worker must die with it; the others take both.

    A life that ends before it was killed often enough is followed by another.
    """
    expected, seconds = undisturbed
    moments = random.Random(seed)
    done, lives = 0, 0
    while done < kills:
        lives += 1
        home = copied(submitted, room / str(lives))
        for number in range(done, kills):
            delay = moments.uniform(0.02, 0.3) * seconds
            if not was_killed(home, delay, is_alone=number % 3 == 0):
                break
            done += 1
            with child.alone(home, worker.LOCK_NAME):  # an orphan is gone
                life.check_visible(home, BATCHES)
        life.live_in_child(home)
        life.check_visible(home, BATCHES)
        assert life.outcome(home) == expected, f"life {lives}, after {done} kills"
        shutil.rmtree(home.parent)
    print(f"{done} kills in {lives} lives of {seconds:.1f} s")
    assert done == kills


def was_killed(home: Path, delay_seconds: float, *, is_alone: bool) -> bool:
    """Live, and be killed after so many seconds; false where the life had ended well by then.

    A drop that the daemon dies over three times in a row counts as the cause, so the third time is left out.
    """
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        with suppress(BaseException):
            life.live(home)
            os._exit(0)
        os._exit(1)
    with suppress(PermissionError, ProcessLookupError):
        os.setpgid(pid, pid)  # whoever of the two comes first
    for _ in moments_until(time.monotonic() + delay_seconds, home):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            assert os.waitstatus_to_exitcode(status) == 0
            return False
    (os.kill if is_alone else os.killpg)(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def moments_until(deadline: float, home: Path) -> Iterator[None]:
    """Moments a little apart, until it may be killed."""
    while time.monotonic() < deadline or is_suspect(home):
        yield
        time.sleep(0.002)


def is_suspect(home: Path) -> bool:
    """Whether the daemon has died so often over a drop that once more is the drop's fault."""
    spool = Spool(home)
    for batch in spool.ids("incoming"):
        with suppress(InboxError):  # it left just now
            if read_claim(spool.state_dir("incoming") / batch).attempts >= MAX_CRASHES - 1:
                return True
    return False
