"""The program: exit codes, one JSON document per command, and errors in one sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.home import create_home
from tests.daemon.running.conftest import draw_class
from tests.deploy.tiny import found_tiny, stage_update

ROOT = Path(__file__).resolve().parents[3]
READS = [
    (["status"], ["home", "daemon", "state", "live", "pin", "working", "batches", "inbox", "trouble"]),
    (["versions"], ["versions"]),
    (["show"], ["schema", "version", "kind", "files", "architecture"]),
    (["show", "0"], ["version", "created_at", "software"]),
    (["classes"], ["version", "classes"]),
    (["verify"], ["version", "files", "parity", "structure_checked"]),
    (["check-config"], ["file", "config"]),
]


@pytest.mark.parametrize(("arguments", "keys"), READS, ids=" ".join)
def test_commands_that_look_print_one_json_document(dynlora, home, arguments, keys):
    """With --json stdout is one document; without it, text for people."""
    code, out, _ = dynlora(*arguments, "--home", home, "--json")
    assert code == 0
    assert set(keys) <= set(json.loads(out))

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


def test_check_config_names_what_the_environment_says(dynlora, home, monkeypatch):
    """An operator who wonders why a key of the file does not count finds the variable."""
    (home / "config.toml").write_text("[learning]\nsteps = 8\n")
    monkeypatch.setenv("DYNLORA_LEARNING_STEPS", "40")

    code, out, _ = dynlora("check-config", "--home", home)
    sets = "the environment sets DYNLORA_LEARNING_STEPS\n"
    assert (code, out) == (0, f"{home / 'config.toml'} is fine; {sets}")
    found = json.loads(dynlora("check-config", "--home", home, "--json")[1])
    assert found["environment"] == ["DYNLORA_LEARNING_STEPS"]
    assert found["config"]["learning"]["steps"] == 40
    (home / "config.toml").unlink()
    _, out, _ = dynlora("check-config", "--home", home)
    assert out == f"no configuration file; the defaults count; {sets}"


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


def test_verify_says_of_a_version_without_its_weights_how_it_comes_back(dynlora, tmp_path):
    """Thin or pruned is no damage: the first file that is missing would say nothing to anybody."""
    create_home(tmp_path / "home")
    store = found_tiny(tmp_path / "home" / "serving")
    for number in (1, 2, 3, 4):
        store.publish(*stage_update(store, f"{number:06d}-x", [f"x {number}"]))
    store.prune(keep_full=2)

    code, _, err = dynlora("verify", "1", "--home", tmp_path / "home")
    assert code == 1
    assert "version 1 has no weights to verify: it is pruned; `dynlora rebuild 1` brings it back" in err


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
