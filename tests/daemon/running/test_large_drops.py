"""A drop too large for the daemon's loop: a process takes it in, everything else goes on, nothing is lost."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from daemon.claim import read_claim
from daemon.home import create_home
from daemon.intake import LARGE_ENTRIES
from daemon.requests import Request, leave, take_answer
from daemon.rest import Pause, write_pause
from daemon.status import read_status
from tests.daemon.running.conftest import QUICK, Bench, draw_class
from tests.deploy.tiny import found_tiny

LARGE = LARGE_ENTRIES + 20
BATCH = "000001-cups"


@pytest.fixture
def bench(tmp_path):
    """A service on a small home that is paused: batches are taken in, and wait."""
    home = tmp_path / "home"
    create_home(home)
    found_tiny(home / "serving")
    write_pause(home, Pause(who="ann"))
    bench = Bench(home, QUICK)
    bench.service.start()
    yield bench
    bench.service.stop(lambda: True)


@pytest.fixture
def large(bench):
    """A service whose inbox has a large drop, and the process that takes it in stopped in its tracks."""
    draw_class(bench.home / "inbox" / "cups", LARGE)
    bench.service.reception.wake.set()
    bench.tick_until(lambda: bench.service.reception.taking_in)
    bench.tick_until(lambda: list(bench.home.glob(f"spool/incoming/{BATCH}/source/cups")))
    os.kill(pid_of(bench), signal.SIGSTOP)
    yield bench
    if bench.service.reception.taking_in:
        os.kill(pid_of(bench), signal.SIGCONT)


def pid_of(bench) -> int:
    """Of the process that takes in a large drop."""
    return bench.service.reception._intake.lane._worker.pid


def go_on(bench) -> None:
    """Let the process go on, and wait until the large drop is in."""
    os.kill(pid_of(bench), signal.SIGCONT)
    bench.tick_until(lambda: bench.spool.find(BATCH) not in (None, "incoming"))


def test_requests_and_small_drops_do_not_wait_for_a_large_one(large):
    """A pause is answered, another drop is taken in and told of, the status says what is at hand."""
    name = leave(large.home, Request(command="pause", who="ann"))
    large.tick()
    assert take_answer(large.home, name).exit_code == 0
    large.drop("hats")
    large.service.reception.wake.set()
    large.tick_until(lambda: large.spool.ids("queued") == ["000002-hats"])

    assert large.spool.find(BATCH) == "incoming"
    assert read_status(large.home)["taking_in"]["batch"] == BATCH
    assert f"taking in {BATCH}: " in large.service.summary

    go_on(large)
    assert large.spool.ids("queued") == [BATCH, "000002-hats"]
    assert len(large.spool.load(BATCH).images) == LARGE
    assert large.events()[-1] == "queued"


def test_how_a_large_drop_is_split_takes_those_into_account_that_overtook_it(large):
    """An image that grades the small drop is not learnt from with the large one."""
    source = next((large.home / "spool" / "incoming" / BATCH / "source").iterdir())
    folder = large.home / "inbox" / "mugs"
    folder.mkdir()
    for path in sorted(source.iterdir())[:10]:
        shutil.copy(path, folder)
    large.service.reception.wake.set()
    large.tick_until(lambda: large.spool.ids("queued") == ["000002-mugs"])
    go_on(large)

    graded = {image.sha256 for image in large.spool.load("000002-mugs").split("exam")}
    assert graded
    assert graded <= {image.sha256 for image in large.spool.load(BATCH).split("exam")}


def test_a_process_that_dies_is_followed_by_another_one(large, caplog):
    """And the drop is whole in the end; it was no fault of the drop's."""
    os.kill(pid_of(large), signal.SIGKILL)
    large.tick_until(lambda: large.service.reception.taking_in is None)
    [told] = [record for record in caplog.records if record.message == "intake process ended"]
    assert f"the process that takes in {BATCH} was killed by SIGKILL" in str(vars(told))
    large.now += 40
    large.tick_until(lambda: large.spool.find(BATCH) not in (None, "incoming"))

    assert len(large.spool.load(BATCH).images) == LARGE


def test_a_drop_whose_process_dies_each_time_is_put_into_failed(bench):
    """A decoder that crashes, or a limit of memory: the daemon lives, and the next drop is taken in."""
    draw_class(bench.home / "inbox" / "cups", LARGE)
    bench.service.reception.wake.set()
    for attempt in range(1, 4):
        bench.tick_until(lambda: bench.service.reception.taking_in)
        directory = bench.spool.state_dir("incoming") / BATCH
        bench.tick_until(lambda at=attempt, where=directory: read_claim(where).attempts == at)
        os.kill(pid_of(bench), signal.SIGKILL)
        bench.tick_until(lambda: bench.service.reception.taking_in is None)
        bench.now += 40
    bench.tick_until(lambda: bench.spool.find(BATCH) == "failed")

    assert "the process that read this drop ended 3 times in a row" in bench.spool.reason(BATCH).reason
    assert len(list((bench.spool.path(BATCH) / "source" / "cups").iterdir())) == LARGE


@pytest.mark.parametrize("how", ["asked", "forced"])
def test_a_stop_while_a_large_drop_is_taken_in_counts_for_nothing(large, how: str):
    """However often: the drop stays claimed, and the next daemon takes it in."""
    process = pid_of(large)
    if how == "asked":
        os.kill(process, signal.SIGCONT)
    large.service.stop(lambda: how == "forced")

    assert not Path(f"/proc/{process}").exists()
    if large.spool.find(BATCH) == "incoming":  # else it was quicker
        assert read_claim(large.spool.path(BATCH)).attempts == 0
    large.new_service().start()
    large.tick_until(lambda: large.spool.find(BATCH) not in (None, "incoming"))
    assert len(large.spool.load(BATCH).images) == LARGE


def test_an_archive_of_many_files_is_unpacked_beside_the_loop(bench, tmp_path):
    """It is one entry of the inbox, and large by its bytes."""
    draw_class(tmp_path / "made" / "cups", 10)
    (tmp_path / "made" / "cups" / "film.bin").write_bytes(os.urandom(17 << 20))
    shutil.make_archive(str(bench.home / "inbox" / "cups"), "zip", tmp_path / "made")
    bench.service.reception.wake.set()
    bench.tick_until(lambda: bench.service.reception.taking_in)
    bench.tick_until(lambda: bench.spool.find(BATCH) not in (None, "incoming"))

    assert len(bench.spool.load(BATCH).images) == 10


def test_a_large_drop_waits_for_space_and_small_ones_do_not(mount_tmpfs, tmp_path):
    """It is kept where it is, the status says what to do, and it is taken in once there is space."""
    inbox = tmp_path / "inbox"
    draw_class(inbox / "cups", 10)
    (inbox / "cups" / "film.bin").write_bytes(os.urandom(17 << 20))
    home = mount_tmpfs("home", 10 << 20)
    create_home(home)
    found_tiny(home / "serving")
    write_pause(home, Pause(who="ann"))
    (home / "config.toml").write_text(f'inbox.path = "{inbox}"\n')
    elsewhere = QUICK.inbox.model_copy(update={"path": str(inbox)})
    bench = Bench(home, QUICK.model_copy(update={"inbox": elsewhere}))
    bench.service.start()
    try:
        bench.tick_until(lambda: bench.service.reception.waits)
        assert bench.service.reception.waits.startswith("the disk is full")
        bench.tick_until(lambda: bench.service.reception.taking_in is None)
        draw_class(inbox / "hats", 5)
        bench.service.reception.wake.set()
        bench.tick_until(lambda: bench.spool.ids("queued") == ["000002-hats"])
        assert bench.spool.find(BATCH) == "incoming"

        subprocess.run(["mount", "-o", "remount,size=64m", str(home)], check=True)
        bench.now += 40
        bench.tick_until(lambda: bench.spool.find(BATCH) == "queued")
        assert len(bench.spool.load(BATCH).images) == 10
    finally:
        bench.service.stop(lambda: True)
