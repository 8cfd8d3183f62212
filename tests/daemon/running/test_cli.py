"""The program: exit codes, one JSON document per command, and errors in one sentence."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from daemon import cli, loop
from daemon.lifecycle import Launch
from tests.daemon.running.conftest import STANDIN, draw_class

ROOT = Path(__file__).resolve().parents[3]
QUICK = "[inbox]\nsettle_seconds = 0.0\ngather_seconds = 0.0\nscan_seconds = 0.05\n[attempts]\nmax = 1\n"


@pytest.fixture
def quick_home(home):
    """A home whose inbox is taken in at once."""
    (home / "config.toml").write_text(QUICK)
    return home


@pytest.fixture
def standin(monkeypatch):
    """`run` in this process starts the stand-in worker."""
    make = lambda *arguments: [sys.executable, str(STANDIN), *arguments]  # noqa: E731
    monkeypatch.setattr(loop, "Launch", functools.partial(Launch, make_command=make))


@pytest.fixture
def dynlora(capsys, monkeypatch, tmp_path):
    """Run a command in this process; its exit code, stdout and stderr."""
    monkeypatch.delenv("DYNLORA_HOME", raising=False)
    monkeypatch.delenv("DYNLORA_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return ended.value.code, out, err

    return run


def behave(home, **behaviour):
    """Tell the stand-in worker how to behave."""
    (home / "behaviour.json").write_text(json.dumps(behaviour))


def start_daemon(home, *, once=False):
    """`dynlora run` as a process of its own, with the stand-in worker."""
    code = (
        "import functools, sys; from daemon import cli, loop; from daemon.lifecycle import Launch;"
        f"make = lambda *a: [sys.executable, {str(STANDIN)!r}, *a];"
        "loop.Launch = functools.partial(Launch, make_command=make); cli.main(sys.argv[1:])"
    )
    arguments = ["run", "--home", str(home), *(["--once"] if once else [])]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def running(quick_home):
    """A daemon of another process on the home, up and idle; asked to stop at the end."""
    process = start_daemon(quick_home)
    deadline = time.monotonic() + 30
    while not (quick_home / "status.json").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield process
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)


READS = [
    (["status"], {"home", "daemon", "state", "live", "pin", "working", "batches", "inbox", "trouble"}),
    (["versions"], {"versions"}),
    (["show"], {"schema", "version", "kind", "files", "architecture"}),
    (["show", "0"], {"version", "created_at", "software"}),
    (["classes"], {"version", "classes"}),
    (["verify"], {"version", "files", "parity", "structure_checked"}),
    (["check-config"], {"file", "config"}),
]


@pytest.mark.parametrize(("arguments", "keys"), READS, ids=" ".join)
def test_commands_that_look_print_one_json_document(dynlora, home, arguments, keys):
    """With --json stdout is one document; without it, text for people."""
    code, out, _ = dynlora(*arguments, "--home", home, "--json")
    assert code == 0
    assert keys <= set(json.loads(out))

    code, out, _ = dynlora("--home", home, *arguments)
    assert code == 0
    assert out.strip()
    with pytest.raises(ValueError, match=r"Expecting|Extra data"):
        json.loads(out)


def test_common_options_count_before_and_after_the_command_and_the_later_one_wins(dynlora, home, tmp_path):
    """--home and --json may stand on either side; DYNLORA_HOME comes last."""
    assert json.loads(dynlora("--json", "--home", home, "versions")[1])["versions"]
    assert json.loads(dynlora("--home", tmp_path / "nowhere", "versions", "--home", home, "--json")[1])[
        "versions"
    ]


def test_the_environment_names_the_home_where_no_option_does(dynlora, home, monkeypatch):
    """DYNLORA_HOME is for those who have one home."""
    monkeypatch.setenv("DYNLORA_HOME", str(home))

    assert json.loads(dynlora("status", "--json")[1])["home"] == str(home)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["versions", "--nonsense"], "No such option"),
        (["show", "one"], "Invalid value"),
        (["classify"], "Missing argument"),
        (["status"], "is no dynlora home"),
        (["status", "--config", "missing.toml"], "is no dynlora home"),
        (["check-config", "--config", "missing.toml"], "missing.toml (from --config) is not a file"),
    ],
)
def test_usage_and_configuration_errors_exit_with_2(dynlora, arguments, sentence):
    """One sentence on stderr, and with --json the same as a document on stdout."""
    code, out, err = dynlora(*arguments)
    assert (code, out) == (2, "")
    assert sentence in err

    code, out, _ = dynlora(*arguments, "--json")
    assert code == 2
    assert sentence in json.loads(out)["error"]


def test_a_wrong_key_in_the_configuration_is_named_with_its_nearest_neighbour(dynlora, home):
    """Every command that reads the configuration ends the same way."""
    (home / "config.toml").write_text("[inbox]\nsetle_seconds = 3\n")
    for command in (["check-config"], ["run", "--once"], ["submit", "x"]):
        code, _, err = dynlora(*command, "--home", home)
        assert code == 2
        assert "did you mean inbox.settle_seconds?" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["show", "99"], "version 99"),
        (["verify", "99"], "version 99"),
        (["rollback"], "has no parent to roll back to"),
        (["rollback", "--to", "99"], "version 99"),
        (["unpin"], "no version is pinned"),
        (["submit", "missing-folder"], "does not exist"),
        (["classify", "missing.jpg", "--labels", "a,b"], "missing.jpg"),
    ],
)
def test_work_that_fails_exits_with_1(dynlora, home, arguments, sentence):
    """The sentence says what is wrong; nothing is changed."""
    code, _, err = dynlora(*arguments, "--home", home)
    assert code == 1
    assert sentence in err

    code, out, _ = dynlora(*arguments, "--home", home, "--json")
    assert code == 1
    assert sentence in out
    json.loads(out)


def test_weights_cut_short_are_found_by_verify_and_refused_by_classify(dynlora, home, tmp_path):
    """The file is named, with what was expected and found."""
    weights = home / "serving" / "versions" / "0" / "weights.safetensors"
    weights.chmod(0o644)
    os.truncate(weights, 1_000_000)
    draw_class(tmp_path / "cups", 1)

    for command in (["verify"], ["classify", tmp_path / "cups" / "0.png"]):
        code, _, err = dynlora(*command, "--home", home)
        assert code == 1
        assert "weights.safetensors" in err
        assert "1,000,000" in err or "1000000" in err


def test_a_current_that_points_nowhere_is_told_with_what_to_do_and_a_rollback_mends_it(dynlora, home):
    """Status still answers; versions says what to type; that works."""
    current = home / "serving" / "current"
    current.unlink()
    current.symlink_to("versions/7")

    code, out, _ = dynlora("status", "--home", home)
    assert code == 0
    assert "dynlora rollback --to 0" in out
    code, _, err = dynlora("versions", "--home", home)
    assert code == 1
    assert "dynlora rollback --to 0" in err
    assert dynlora("rollback", "--to", "0", "--home", home)[0] == 0
    assert dynlora("unpin", "--home", home)[0] == 0
    assert dynlora("versions", "--home", home)[0] == 0


def test_classify_answers_with_known_names_or_given_ones_and_goes_on_after_a_bad_file(
    dynlora, home, tmp_path
):
    """The version that answered is named; the bad file costs the exit code, not the other answers."""
    draw_class(tmp_path / "cups", 2)
    (tmp_path / "text.jpg").write_text("no image")
    good = tmp_path / "cups" / "0.png"

    document = json.loads(dynlora("classify", good, "--home", home, "--top", "2", "--json")[1])
    assert document["version"] == 0
    assert len(document["images"][0]["predictions"]) == 2

    code, out, _ = dynlora(
        "classify", tmp_path / "text.jpg", good, "--labels", "a cup, a dog", "--home", home, "--json"
    )
    bad, answer = json.loads(out)["images"]
    assert code == 1
    assert bad["error"]
    assert {p["label"] for p in answer["predictions"]} == {"a cup", "a dog"}
    assert sum(p["score"] for p in answer["predictions"]) == pytest.approx(1, abs=1e-5)


def test_submit_check_says_what_would_be_learnt_and_leaves_the_inbox_alone(dynlora, quick_home, tmp_path):
    """Accepted is 0, refused is 1; nothing is submitted either way."""
    draw_class(tmp_path / "batch" / "cups")
    draw_class(tmp_path / "few" / "cups", 1)

    code, out, _ = dynlora("submit", tmp_path / "batch", "--check", "--home", quick_home, "--json")
    assert (code, json.loads(out)["classes"]) == (0, {"cups": 10})
    code, out, _ = dynlora("submit", tmp_path / "few", "--check", "--home", quick_home, "--json")
    assert (code, json.loads(out)["accepted"]) == (1, False)
    assert list((quick_home / "inbox").iterdir()) == []


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


def test_looking_commands_import_nothing_heavy(home):
    """`dynlora status` must answer at once: no torch, no onnx, no watchdog, no Pillow."""
    code = (
        "import sys; from daemon import cli\n"
        "try: cli.main(['status', '--home', sys.argv[1]])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'open_clip', 'onnx', 'watchdog', 'PIL', 'dynlora'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(home)], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert "version 0" in done.stdout


def wait_until(is_true, seconds=30):
    """Wait for a condition, not for a time."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
