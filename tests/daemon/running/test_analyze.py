"""`dynlora analyze` as a person runs it: the real program, worker and model, on the sample images."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SAMPLES = ROOT / "examples/demo/images"


@pytest.fixture(scope="module")
def home(version_dir, tmp_path_factory):
    """A home with one version that learns by the published recipe, which is quick."""
    from daemon.home import create_home

    home = tmp_path_factory.mktemp("analyze") / "home"
    create_home(home)
    shutil.copytree(version_dir.parent.parent, home / "serving", symlinks=True, dirs_exist_ok=True)
    (home / "config.toml").write_text('[learning]\npreset = "paper"\nthreads = 1\n')
    return home


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """A few of the sample clothes."""
    folder = tmp_path_factory.mktemp("drop") / "clothes"
    for name in ("hat", "shoes"):
        (folder / name).mkdir(parents=True)
        for image in sorted((SAMPLES / "drop/clothing" / name).iterdir())[:6]:
            shutil.copy(image, folder / name)
    return folder


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """Two fruits that are only asked about."""
    folder = tmp_path_factory.mktemp("probe") / "fruit"
    for name in ("apple", "banana"):
        (folder / name).mkdir(parents=True)
        for image in sorted((SAMPLES / "never_dropped" / name).iterdir())[:4]:
            shutil.copy(image, folder / name)
    return folder


def run(home, *arguments):
    """The program's exit code, its JSON and what it said to people."""
    command = [
        sys.executable,
        "-m",
        "daemon.cli",
        "--home",
        str(home),
        "--json",
        "analyze",
        *map(str, arguments),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False
    )
    return done.returncode, json.loads(done.stdout), done.stderr


def files_of(home):
    """What is in the home, with sizes, the log and locks apart."""
    return {
        path.relative_to(home): path.stat().st_size
        for path in home.rglob("*")
        if path.is_file() and path.suffix not in {".log", ".lock"}
    }


def test_a_folder_is_swept_and_drawn_and_nothing_in_the_home_changes(home, batch, probe, tmp_path):
    """Every location has its row, the drawings are real files, and no version was made."""
    before = files_of(home)
    code, found, stderr = run(
        home,
        batch,
        "--probe",
        probe,
        "--ranks",
        "2",
        "--steps",
        "1",
        "--out",
        tmp_path / "out",
    )
    document = json.loads((tmp_path / "out/analysis.json").read_text())

    assert code == 0, stderr
    assert found["trials"] == document["trials"]
    assert [t["location"] for t in found["trials"]][:4] == ["none", "all", "vision", "text"]
    assert document["images"]["learnt"] > 0 < document["images"]["held_out"]
    assert all(0 <= t["probe_accuracy"] <= 1 for t in found["trials"])
    assert files_of(home) == before
    if len(found["files"]) > 1:  # matplotlib is there
        names = {Path(file).name for file in found["files"]}
        assert {"ranks.svg", "ranks.png", "trade-off.svg", "locations.svg"} < names
        assert all(Path(file).stat().st_size > 2000 for file in found["files"])


@pytest.mark.parametrize(
    ("arguments", "why", "code"),
    [
        (["nowhere"], "nowhere does not exist", 1),
        (["{batch}", "--ranks", "four"], "expected numbers of at least 1", 2),
        (["{batch}", "--ranks", "0"], "expected numbers of at least 1", 2),
    ],
)
def test_what_cannot_be_analysed_is_said_in_one_sentence(home, batch, tmp_path, arguments, why, code):
    """No traceback, an exit code, and nothing written."""
    given = [argument.format(batch=batch) for argument in arguments]
    found_code, found, _ = run(home, *given, "--out", tmp_path / "out")

    assert found_code == code
    assert why in found["error"]
    assert not (tmp_path / "out").exists()
