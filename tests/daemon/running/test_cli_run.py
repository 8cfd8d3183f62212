"""`dynlora run` and the commands that talk to a running daemon: outcomes, requests, signals."""

import json
import signal
import threading
import time
from types import SimpleNamespace

from daemon import loop
from daemon.errors import NoSpaceError
from daemon.spool import Spool
from tests.daemon.running.conftest import draw_class
from tests.daemon.running.programs import behave, start_daemon, wait_until


def test_run_once_works_off_the_inbox_and_exits_with_0(dynlora, quick_home, standin, tmp_path):
    """Submit, run, and the version is there; a second run finds nothing to do."""
    draw_class(tmp_path / "cups")
    code, out, _ = dynlora("submit", tmp_path / "cups", "--home", quick_home, "--id", "order-1", "--json")
    assert (code, json.loads(out)["id"]) == (0, "order-1")

    code, out, err = dynlora("run", "--once", "--home", quick_home, "--json")
    assert code == 0
    [outcome] = json.loads(out)["outcomes"]
    assert (outcome["event"], outcome["version"]) == ("published", 1)
    assert "INFO published batch=000001-cups version=1" in err
    assert dynlora("run", "--once", "--home", quick_home)[:2] == (0, "there was nothing to learn\n")

    dynlora("submit", tmp_path / "cups", "--home", quick_home, "--id", "order-1")
    code, out, _ = dynlora("run", "--once", "--home", quick_home)
    assert (code, out) == (0, "000002-cups was not learnt again: 000001-cups brought the same\n")


def test_run_once_exits_with_3_for_a_held_and_1_for_a_failed_batch(dynlora, quick_home, standin):
    """Both are told in a sentence; nothing went live."""
    behave(quick_home, exams=[[40, 10, 0, 0]])
    draw_class(quick_home / "inbox" / "cups")
    code, out, _ = dynlora("run", "--once", "--home", quick_home)
    assert code == 3
    assert "000001-cups was held: gain too small" in out

    behave(quick_home, fail="the images are cursed")
    draw_class(quick_home / "inbox" / "plates")
    code, out, _ = dynlora("run", "--once", "--home", quick_home)
    assert code == 1
    assert "000002-plates failed: 1 of 1 attempts failed; the last one: the images are cursed" in out
    assert [
        row["version"]
        for row in json.loads(dynlora("versions", "--home", quick_home, "--json")[1])["versions"]
    ] == [0]


def test_run_once_ends_with_what_is_wrong_with_the_home(dynlora, quick_home, standin):
    """The batch waits in work/; nothing is put into failed/."""
    behave(quick_home, fail="[learning] steps must be a number", fault="home")
    draw_class(quick_home / "inbox" / "cups")
    code, _, err = dynlora("run", "--once", "--home", quick_home)

    assert code == 1
    assert "Error: [learning] steps must be a number" in err
    assert [path.name for path in (quick_home / "spool" / "work").iterdir()] == ["000001-cups"]


def test_run_once_ends_when_the_disk_is_too_full_to_take_anything_in(
    dynlora, quick_home, standin, monkeypatch
):
    """Exit code 1 and the reason, instead of waiting for ever; the drop is safe."""

    def refuse(*_, **__):
        raise NoSpaceError("the disk is too full to take in cups; free some space")

    monkeypatch.setattr("daemon.intake.Intake._take", refuse)
    draw_class(quick_home / "inbox" / "cups")
    code, _, err = dynlora("run", "--once", "--home", quick_home)

    assert code == 1
    assert "Error: the disk is too full to take in cups" in err
    assert (quick_home / "inbox" / "cups").is_dir()


def test_run_once_cut_short_by_a_signal_exits_with_1(quick_home):
    """The work was not done; a script must not take it for done."""
    behave(quick_home, steps=500, step_seconds=0.02)
    draw_class(quick_home / "inbox" / "cups")
    process = start_daemon(quick_home, once=True)
    wait_until(lambda: list((quick_home / "spool" / "work").glob("*/checkpoint/*")))
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)

    assert process.returncode == 1
    assert "stopped by SIGTERM" in out


def test_run_once_does_not_wait_for_a_pin(dynlora, quick_home, standin):
    """The batch stays queued and the reason is told."""
    assert dynlora("rollback", "--to", "0", "--why", "inspection", "--home", quick_home)[0] == 0
    draw_class(quick_home / "inbox" / "cups")

    code, out, _ = dynlora("run", "--once", "--home", quick_home)
    assert (code, out) == (0, "a version is pinned; batches wait for `dynlora unpin`\n")
    assert "inspection" in dynlora("status", "--home", quick_home)[1]

    assert dynlora("unpin", "--home", quick_home)[0] == 0
    assert dynlora("run", "--once", "--home", quick_home)[0] == 0
    assert json.loads(dynlora("status", "--home", quick_home, "--json")[1])["live"] == 1


def test_a_clock_that_jumps_ahead_makes_no_drop_complete(dynlora, quick_home, monkeypatch, tmp_path):
    """As after a suspend, or on a machine that learns the time late: an hour passes with every look at it."""
    text = "[inbox]\nsettle_seconds = 1.5\ngather_seconds = 1.5\nscan_seconds = 0.05\n"
    (quick_home / "config.toml").write_text(text)
    assert dynlora("rollback", "--to", "0", "--home", quick_home)[0] == 0
    draw_class(tmp_path / "cups", 7)
    first, *others = sorted((tmp_path / "cups").iterdir())
    folder = quick_home / "inbox" / "cups"
    folder.mkdir()
    first.rename(folder / first.name)

    def bring_slowly():
        for picture in others:
            time.sleep(0.5)
            picture.rename(folder / picture.name)

    hours = iter(range(100_000))
    jumping = SimpleNamespace(time=lambda: time.time() + 3600 * next(hours), monotonic=time.monotonic)
    monkeypatch.setattr(loop, "time", jumping)
    writer = threading.Thread(target=bring_slowly)
    writer.start()
    assert dynlora("run", "--once", "--home", quick_home)[0] == 0
    writer.join()

    spool = Spool(quick_home)
    assert (spool.ids("queued"), spool.ids("failed")) == (["000001-cups"], [])
    assert len(spool.load("000001-cups").images) == 7


def test_show_and_versions_tell_a_published_batch_with_its_exam_and_decision(dynlora, quick_home, standin):
    """Before and after, and every rule of the gate in words."""
    draw_class(quick_home / "inbox" / "cups")
    dynlora("run", "--once", "--home", quick_home)

    shown = dynlora("show", "1", "--home", quick_home)[1]
    assert "batch 000001-cups: cups" in shown
    assert "passed  gain: gain: 25.0% → 75.0% right on 40 exam images" in shown
    row = json.loads(dynlora("versions", "--home", quick_home, "--json")[1])["versions"][1]
    assert (row["live"], row["exam_before"], row["exam_after"]) == (True, 0.25, 0.75)


def test_a_second_daemon_is_refused_with_the_pid_of_the_first(dynlora, quick_home, running):
    """Exit code 1, and the first one goes on."""
    code, _, err = dynlora("run", "--home", quick_home)

    assert code == 1
    assert f"pid {running.pid}" in err
    assert running.poll() is None


def test_rollback_and_unpin_go_through_a_running_daemon(dynlora, quick_home, running):
    """The daemon does it, the command takes over its outcome; events name who and why."""
    draw_class(quick_home / "inbox" / "cups")
    wait_until(lambda: json.loads(dynlora("status", "--home", quick_home, "--json")[1])["live"] == 1)

    code, out, _ = dynlora("rollback", "--why", "odd answers", "--home", quick_home, "--json")
    assert (code, json.loads(out)["live"]) == (0, 0)
    status = json.loads(dynlora("status", "--home", quick_home, "--json")[1])
    assert (status["daemon"], status["pin"]["why"]) == (running.pid, "odd answers")
    code, _, err = dynlora("rollback", "--to", "44", "--home", quick_home)
    assert code == 1
    assert "version 44" in err
    assert dynlora("unpin", "--home", quick_home)[0] == 0
    events = [json.loads(line) for line in (quick_home / "events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events[-2:]] == ["rolled_back", "unpinned"]
    assert events[-2]["why"] == "odd answers"


def test_submit_wait_follows_the_batch_to_its_end_and_takes_over_its_outcome(
    dynlora, quick_home, running, tmp_path
):
    """0 when live, 3 when held, 1 when it failed, and progress on stderr."""
    for name, behaviour, code, event in (
        ("cups", {}, 0, "published"),
        ("plates", {"exams": [[40, 10, 0, 0]]}, 3, "held"),
        ("forks", {"fail": "cursed"}, 1, "failed"),
    ):
        behave(quick_home, **behaviour)
        draw_class(tmp_path / name)
        found, out, err = dynlora("submit", tmp_path / name, "--wait", "--home", quick_home, "--json")
        assert (found, json.loads(out)["event"]) == (code, event)
        assert "INFO" in err


def test_submit_wait_says_in_a_sentence_which_version_is_live(dynlora, quick_home, running, tmp_path):
    """For people: nothing but the outcome where nothing was set aside, else that first."""
    draw_class(tmp_path / "cups")
    code, out, _ = dynlora("submit", tmp_path / "cups", "--wait", "--home", quick_home)
    assert (code, out) == (0, "000001-cups is live as version 1\n")

    draw_class(tmp_path / "plates")
    (tmp_path / "plates" / "notes.jpg").write_text("no picture")
    code, out, _ = dynlora("submit", tmp_path / "plates", "--wait", "--home", quick_home)
    first, last = out.splitlines()
    assert code == 0
    assert "notes.jpg" in first
    assert last == "000002-plates is live as version 2"


def test_submit_wait_without_a_daemon_says_that_nobody_will_learn_it(
    dynlora, quick_home, tmp_path, monkeypatch
):
    """The drop is in the inbox all the same."""
    monkeypatch.setattr("daemon.waiting.PATIENCE_SECONDS", 0.2)
    draw_class(tmp_path / "cups")
    code, _, err = dynlora("submit", tmp_path / "cups", "--wait", "--home", quick_home)

    assert code == 1
    assert "the drop is in the inbox, but no daemon is running" in err


def test_sigterm_ends_the_daemon_in_order_with_0_and_the_batch_goes_on_later(quick_home, dynlora, standin):
    """Worker stopped at a checkpoint, a log line per step, the lock free, the batch in work/."""
    behave(quick_home, steps=500, step_seconds=0.02)
    draw_class(quick_home / "inbox" / "cups")
    process = start_daemon(quick_home)
    wait_until(lambda: list((quick_home / "spool" / "work").glob("*/checkpoint/*")))
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=30)

    assert process.returncode == 0
    steps = ["stopping signal=SIGTERM", "stopping what=worker", "worker stopped", "INFO stopped"]
    positions = [log.index(step) for step in steps]
    assert positions == sorted(positions)

    behave(quick_home, steps=1)
    assert dynlora("run", "--once", "--home", quick_home)[0] == 0
    assert json.loads(dynlora("status", "--home", quick_home, "--json")[1])["live"] == 1


def test_a_second_ctrl_c_does_not_wait_for_the_worker(quick_home):
    """The first asks, the second forces; nothing is lost either way."""
    behave(quick_home, steps=2, step_seconds=60)
    draw_class(quick_home / "inbox" / "cups")
    process = start_daemon(quick_home)
    wait_until(lambda: list((quick_home / "spool" / "work").glob("*/plan.json")))
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None  # it waits for a checkpoint
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    process.communicate(timeout=30)

    assert time.monotonic() - started < 10
    assert process.returncode == 0
