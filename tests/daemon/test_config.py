"""The configuration: the example equals the models, and complaints name what to change."""

import tomllib
from pathlib import Path

import pytest

from daemon.config import Config, valid_keys
from daemon.config_sources import find_config, load_config, read_config
from daemon.environment import variable_of, variables
from daemon.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "config.example.toml"


def complaint(tmp_path: Path, text: str) -> str:
    """What reading `text` is answered with."""
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_the_example_has_every_key_at_its_default() -> None:
    """A user who copies the example changes nothing, and misses no key."""
    assert tomllib.loads(EXAMPLE.read_text(encoding="utf-8")) == Config().model_dump()
    assert read_config(EXAMPLE) == Config()


def test_every_key_of_the_example_is_explained() -> None:
    """Each line with a key carries its reason."""
    for line in EXAMPLE.read_text(encoding="utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            assert len(line.split("# ", 1)[1]) > 10, line


def test_an_unknown_key_is_answered_with_the_nearest_valid_one(tmp_path: Path) -> None:
    """A typing error costs one look at the message."""
    message = complaint(tmp_path, "[inbox]\nsetle_seconds = 3\n")

    assert "unknown key inbox.setle_seconds; did you mean inbox.settle_seconds?" in message


def test_a_key_in_the_wrong_section_is_answered_with_the_right_one(tmp_path: Path) -> None:
    """The name was right, the place was not."""
    assert "did you mean inbox.settle_seconds?" in complaint(tmp_path, "settle_seconds = 3\n")


def test_an_unknown_section_is_answered_with_the_nearest_valid_one(tmp_path: Path) -> None:
    """As for keys."""
    assert "unknown key learn; did you mean [learning]?" in complaint(tmp_path, "[learn]\nrank = 3\n")


def test_a_key_like_no_other_is_answered_with_the_sections(tmp_path: Path) -> None:
    """Where there is nothing near, the message says where to look."""
    message = complaint(tmp_path, "xyzzy = 3\n")

    assert "the sections are [inbox], [learning]" in message
    assert "config.example.toml" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[inbox]\nsettle_seconds = "soon"\n', "inbox.settle_seconds is 'soon'; expected a valid number"),
        ("[learning]\nrank = 1.5\n", "learning.rank is 1.5; expected a valid integer"),
        ("[exam]\nkeep = 1\n", "exam.keep is 1; expected a valid boolean"),
        (
            '[learning]\npreset = "fast"\n',
            "learning.preset is 'fast'; expected 'default', 'paper' or 'reference'",
        ),
        (
            "[inbox]\nmax_image_pixels = 80_000_001\n",
            "inbox.max_image_pixels is 80000001; expected less than or equal to 80000000",
        ),
        ("[store]\nkeep_full = 1\n", "store.keep_full is 1; expected greater than or equal to 2"),
        ('[inbox]\ntemplate = "a photo"\n', "inbox.template is 'a photo'; expected exactly one {}"),
        ("[exam]\nfraction = 0.6\ntune_fraction = 0.4\n", "leave nothing to train on"),
        ("inbox = 3\n", "inbox is 3; expected a section, written as [inbox]"),
        ("[inbox\n", "is not valid TOML"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(tmp_path: Path, text: str, expected: str) -> None:
    """Key, value and expectation stand in one sentence."""
    assert expected in complaint(tmp_path, text)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    """One run of check-config shows everything there is to correct."""
    message = complaint(tmp_path, "[inbox]\nfoo = 3\n[learning]\nrank = -1\n")

    assert len(message.splitlines()) == 2


def test_a_missing_inbox_folder_is_named(tmp_path: Path) -> None:
    """A path in the configuration must exist: a typing error must not become an empty inbox."""
    message = complaint(tmp_path, '[inbox]\npath = "drops"\n')

    assert f"inbox.path is 'drops', but {tmp_path / 'drops'} is not a folder; create it" in message


def test_the_inbox_path_is_relative_to_the_file(tmp_path: Path) -> None:
    """Moving about with cd changes nothing."""
    (tmp_path / "drops").mkdir()
    (tmp_path / "config.toml").write_text('[inbox]\npath = "drops"\n')

    config = load_config(None, tmp_path)

    assert config.inbox_dir(Path("/elsewhere")) == tmp_path / "drops"


@pytest.mark.parametrize("inbox", [".", "..", "spool", "serving", "exams", "requests/done"])
def test_an_inbox_among_the_daemons_own_files_is_refused(tmp_path: Path, inbox: str) -> None:
    """It would take them for drops, and move them."""
    home = tmp_path / "home"
    for name in ("spool", "serving", "exams", "requests/done", "inbox/deeper"):
        (home / name).mkdir(parents=True)
    (home / "config.toml").write_text(f'[inbox]\npath = "{inbox}"\n')

    with pytest.raises(ConfigError, match="the daemon would take its own files for drops"):
        load_config(None, home)
    for fine in ("inbox", "inbox/deeper"):
        (home / "config.toml").write_text(f'[inbox]\npath = "{fine}"\n')
        assert load_config(None, home).inbox_dir(home) == home / fine


def test_a_file_asked_for_by_name_must_exist(tmp_path: Path) -> None:
    """A missing --config or DYNLORA_CONFIG is an error, never the defaults."""
    with pytest.raises(ConfigError, match=r"/nope.toml \(from --config\) is not a file"):
        find_config(tmp_path, Path("/nope.toml"), environ={})
    with pytest.raises(ConfigError, match=r"/nope.toml \(from DYNLORA_CONFIG\) is not a file"):
        find_config(tmp_path, None, environ={"DYNLORA_CONFIG": "/nope.toml"})


def test_the_first_place_that_has_a_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--config, then DYNLORA_CONFIG, then the home, then the working directory, then the defaults."""
    home, here = tmp_path / "home", tmp_path / "here"
    files = [tmp_path / "explicit.toml", tmp_path / "env.toml", home / "config.toml", Path("config.toml")]
    home.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    for file in files:
        file.write_text("")
    environ = {"DYNLORA_CONFIG": str(files[1])}

    assert find_config(home, files[0], environ=environ) == files[0]
    assert find_config(home, None, environ=environ) == files[1]
    assert find_config(home, None, environ={}) == files[2]
    files[2].unlink()
    assert find_config(home, None, environ={}) == files[3]
    files[3].unlink()
    assert find_config(home, None, environ={}) is None
    assert load_config(None, home) == Config()


def test_a_variable_of_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    """Numbers and lists as in TOML, text as it is; what the environment says nothing of stays."""
    (tmp_path / "config.toml").write_text("[learning]\nsteps = 8\nrank = 4\n")
    environ = {
        "DYNLORA_LEARNING_STEPS": "40",
        "DYNLORA_EXAM_MIN_GAIN": "0.5",
        "DYNLORA_EXAM_KEEP": "false",
        "DYNLORA_SCHEDULE_WINDOWS": '["mon-fri 22:00-06:00"]',
        "DYNLORA_MLFLOW_EXPERIMENT": "2026",
        "DYNLORA_HOME": "/srv/d",
        "DYNLORA_EVENT": "published",
        "OTHER_LEARNING_RANK": "2",
    }
    config = load_config(None, tmp_path, environ=environ)

    assert (config.learning.steps, config.learning.rank) == (40, 4)
    assert (config.exam.min_gain, config.exam.keep) == (0.5, False)
    assert config.schedule.windows == ["mon-fri 22:00-06:00"]
    assert config.mlflow.experiment == "2026"
    assert load_config(None, tmp_path / "nowhere", environ=environ).learning.steps == 40


def test_every_key_has_a_variable_of_its_own() -> None:
    """No two keys share one, and none is what names home, file or event."""
    names = [variable_of(key) for key, _ in valid_keys()]

    assert len(names) == len(set(names))
    assert not {"DYNLORA_HOME", "DYNLORA_CONFIG", "DYNLORA_EVENT", "DYNLORA_BATCH"} & set(names)
    environ = dict.fromkeys(names, "")
    assert {name for name, _ in variables(environ, dict(valid_keys())).values()} == set(names)


def test_a_mistake_is_told_of_whoever_made_it(tmp_path: Path) -> None:
    """The file for what it says, the variable for what that says, both where they do not fit together."""
    path = tmp_path / "config.toml"
    path.write_text("[learning]\nrank = 2.5\n[exam]\nfraction = 0.6\n")
    environ = {"DYNLORA_LEARNING_STEPS": "many", "DYNLORA_EXAM_TUNE_FRACTION": "0.5"}
    with pytest.raises(ConfigError) as refused:
        load_config(None, tmp_path, environ=environ)

    rank, steps, both = str(refused.value).splitlines()
    assert rank == f"{path}: learning.rank is 2.5; expected a valid integer"
    assert steps == "DYNLORA_LEARNING_STEPS: learning.steps is 'many'; expected a valid integer"
    assert both.startswith(
        f"{path} and DYNLORA_EXAM_TUNE_FRACTION: exam: fraction 0.6 and tune_fraction 0.5 "
    )
