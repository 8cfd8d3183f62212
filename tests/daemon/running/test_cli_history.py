"""The commands as people type them: what they print, how they exit, with a daemon running and without."""

import functools
import json
import os
import signal
import subprocess
import sys

import pytest

from daemon import ordering
from daemon.lifecycle import Launch
from daemon.lock import HomeLock
from daemon.report import ExamResult
from tests.daemon.running.programs import ROOT
from tests.daemon.running.tiny_home import TinyHome, batch_name

HARM = ExamResult(batch=batch_name(3), images=40, correct_before=30, correct_after=10, gained=0, lost=20)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A home of versions 0 to 4, and no daemon."""
    tiny = TinyHome(tmp_path / "home")
    tiny.create(4)
    monkeypatch.setattr(ordering, "Launch", functools.partial(Launch, make_command=tiny.make_command))
    return tiny


def test_a_revert_shows_what_each_exam_gains_and_loses_and_who_decided(tiny, dynlora):
    """Refused with exit code 3; insisted upon, it is live."""
    tiny.exams = [HARM]
    arguments = ("--home", tiny.home, "revert", batch_name(2))

    code, out, _ = dynlora(*arguments)
    assert code == 3
    assert out.splitlines()[1].split() == [batch_name(3), "40", "75.0%", "25.0%", "0", "20"]
    assert "failed  old_exams: evidence of loss" in out
    assert "nothing was published" in out
    code, out, _ = dynlora(*arguments, "--json")
    assert (code, json.loads(out)["exams"]) == (3, [HARM.model_dump()])

    code, out, _ = dynlora(*arguments, "--insist", "--why", "mislabelled")
    assert code == 0
    assert "decided: mislabelled" in out
    assert out.splitlines()[-1] == f"{batch_name(2)} was taken out; version 5 is live"
    assert dynlora(*arguments)[1] == "nothing to do: that was done as version 5\n"
    code, out, _ = dynlora("--home", tiny.home, "versions")
    assert out.splitlines()[-1].split()[1] == "revert"
    code, out, _ = dynlora("--home", tiny.home, "show")
    assert "published without the batch by" in out.splitlines()[-1]


def test_thin_without_versions_thins_all_that_may_go_and_rebuild_brings_them_back(tiny, dynlora):
    """Batch after batch, with what it freed."""
    code, out, _ = dynlora("--home", tiny.home, "thin")
    assert (code, out.split(";")[0]) == (0, "thinned: 1, 2")
    code, out, _ = dynlora("--home", tiny.home, "versions", "--json")
    states = [row["state"] for row in json.loads(out)["versions"]]
    assert states == ["full", "thin", "thin", "full", "full"]

    code, out, _ = dynlora("--home", tiny.home, "rebuild", "2")
    assert (code, out) == (
        0,
        "version 2 is whole: rebuilt weights.safetensors; every byte is what was published\n",
    )
    assert dynlora("--home", tiny.home, "rebuild", "2")[1] == "version 2 is whole: nothing was missing\n"
    assert dynlora("--home", tiny.home, "thin")[1].startswith("thinned: 2")
    assert dynlora("--home", tiny.home, "thin")[1] == "nothing to free\n"
    code, out, _ = dynlora("--home", tiny.home, "thin", "4")
    assert (code, out) == (1, "version 4 stays as it is: it is live\n")
    code, _, err = dynlora("--home", tiny.home, "rebuild", "9")
    assert (code, "version 9 cannot be used" in err) == (1, True)


def test_a_dry_run_says_what_prune_does(tiny, dynlora):
    """By the configuration's policy or another number; nothing is done until it is."""
    code, out, _ = dynlora("--home", tiny.home, "prune", "--dry-run", "--json")
    planned = json.loads(out)
    assert (code, planned["versions"], planned["dry_run"]) == (0, [1], True)
    assert tiny.store.is_full(1)
    assert dynlora("--home", tiny.home, "prune", "--keep", "1", "--dry-run")[1].startswith(
        "would be pruned: 1, 2;"
    )

    code, out, _ = dynlora("--home", tiny.home, "prune", "--json")
    done = json.loads(out)
    assert (done["versions"], done["bytes"]) == (planned["versions"], planned["bytes"])
    assert not tiny.store.is_full(1)


def test_forget_says_what_went_and_what_remains(tiny, dynlora):
    """In words, since nobody can look it up afterwards."""
    code, out, _ = dynlora("--home", tiny.home, "forget", batch_name(1))

    assert code == 0
    assert out.startswith(
        f"{batch_name(1)} is forgotten; files removed: 2 in spool, 2 in exams\nWhat remains:\n"
    )
    assert "the images' hashes" in out
    assert dynlora("--home", tiny.home, "forget", "nothing")[0] == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("is_interrupted", [False, True], ids=["awaited", "interrupted"])
def test_a_command_follows_a_running_daemon_to_the_end_or_gives_it_up(tiny, is_interrupted):
    """The daemon does the work while it goes on ticking; Ctrl-C at the command's terminal ends it."""
    tiny.start()
    tiny.child = ["sleep", "300"] if is_interrupted else None
    command = [sys.executable, "-m", "daemon.cli", "--home", str(tiny.home), "promote", tiny.add("held", 5)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with HomeLock(tiny.home):
        program = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while program.poll() is None:
            tiny.tick()
            if is_interrupted and tiny.service._reviser.working is not None:
                program.send_signal(signal.SIGINT)
                is_interrupted, tiny.child = False, ["was interrupted"]
        out, err = program.communicate()
        for _ in range(3):
            tiny.tick()
        tiny.service.stop(lambda: True)

    if tiny.child is None:
        assert (program.returncode, tiny.store.current()) == (0, 5), err
        assert f"{batch_name(5)} was promoted; version 5 is live" in out
    else:
        assert (program.returncode, tiny.store.current()) == (1, 4)
        assert not list(tiny.store.versions_dir.glob(".staging-*"))
    assert not list((tiny.home / "requests").glob("*.json"))
