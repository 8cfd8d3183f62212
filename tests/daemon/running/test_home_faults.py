"""What is wrong with the installation or the home is told as that, in one sentence, and harms no batch."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from daemon import cli_feed
from deploy.store import VersionStore
from tests.daemon.running.conftest import QUICK_TOML, make_home
from tests.daemon.running.programs import ROOT


def test_init_without_torch_says_what_to_install_and_makes_nothing(dynlora, tmp_path, monkeypatch):
    """The same command works once it is installed."""
    monkeypatch.setattr(cli_feed, "find_spec", lambda name: None if name == "torch" else name)
    code, _, err = dynlora("init", tmp_path / "home")

    assert code == 1
    assert "torch is not installed" in err
    assert "pip install 'dynlora[daemon]'" in err
    assert not (tmp_path / "home").exists()


def test_init_of_a_model_without_weights_is_a_usage_error_and_makes_nothing(dynlora, tmp_path):
    """Known at once, without torch; what brings its own weights needs none named."""
    code, _, err = dynlora("init", tmp_path / "home", "--model", "ViT-B-16")

    assert code == 2
    assert "ViT-B-16 was named without weights; expected --pretrained" in err
    assert not (tmp_path / "home").exists()


def test_an_init_that_failed_leaves_what_was_there_before_and_no_half_of_a_home(dynlora, tmp_path):
    """One process of the worker: a model that nobody knows. The path is free for the next try."""
    (tmp_path / "home" / "inbox" / "cups").mkdir(parents=True)
    (tmp_path / "home" / "notes.txt").write_text("mine")
    code, _, err = dynlora("init", tmp_path / "home", "--model", "ViT-Q", "--pretrained", "openai")

    assert code == 2
    assert "open_clip knows no architecture 'ViT-Q'" in err
    assert {path.name for path in (tmp_path / "home").rglob("*")} == {"inbox", "cups", "notes.txt"}
    code, _, err = dynlora("status", "--home", tmp_path / "home")
    assert code == 2
    assert "is no dynlora home" in err


@pytest.mark.parametrize("command", [["init"], ["adapt", "--batch", "000001-cups", "--parent", "0"]])
def test_a_worker_without_torch_blames_the_installation_not_the_batch(tmp_path, command):
    """It says so in the protocol; the batch stays where it is."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
    )
    name, *rest = command
    arguments = ["--parent-pid", str(os.getpid()), name, "--home", str(tmp_path), *rest]
    done = subprocess.run(
        [sys.executable, "-m", "daemon.worker", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    said = json.loads(done.stdout.splitlines()[-1])

    assert done.returncode == 1
    assert said["message"] == "torch is not installed; pip install 'dynlora[daemon]'"
    assert said["fault"] == "home"


def _misspell(home):
    (home / "config.toml").write_text("[learning]\nsteps = 'many'\n")


def _lose_version(home):
    shutil.rmtree(home / "serving" / "versions" / "0")


def _fill_up(home):
    (home / "spool" / "work" / "filler").write_bytes(bytes(4096))


def _cut_weights(home):
    path = home / "serving" / "versions" / "0" / "weights.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


# The real worker, several times in one process of its own: importing torch takes it longer than all else.
WORKERS = """
import json, os, sys
from daemon import worker
stdout = os.dup(1)
for arguments in json.load(sys.stdin):
    os.dup2(stdout, 1)  # a worker keeps it for itself
    try:
        worker.main(arguments)
    except SystemExit as ended:
        os.write(stdout, json.dumps({"event": "ended", "code": ended.code}).encode() + b"\\n")
"""


def work(homes):
    """Run the real worker on the batch of this file in each home; exit codes and the last things said."""
    options = ("--batch", "000001-cups", "--parent", "0", "--parent-pid", str(os.getpid()))
    orders = [
        [*options[4:], "adapt", "--home", str(home), "--config", str(home / "config.toml"), *options[:4]]
        for home in homes
    ]
    done = subprocess.run(
        [sys.executable, "-c", WORKERS], input=json.dumps(orders), cwd=ROOT,
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    said = [json.loads(line) for line in done.stdout.splitlines()]
    ends = [number for number, message in enumerate(said) if message["event"] == "ended"]
    return [(said[end]["code"], said[end - 1]) for end in ends]


def test_a_worker_blames_the_home_for_its_configuration_its_versions_and_its_disk(
    version_dir, tmp_path, mount_tmpfs
):
    """A typo, a version that is gone, live weights cut short, a full disk: no batch is to blame.

    No attempt is lost to them, and the sentence about the disk says what to do.
    """
    spoils, skipped = [_misspell, _lose_version, _cut_weights], None
    try:
        disk = mount_tmpfs("small", 8192)  # two pages
        spoils.append(_fill_up)
    except pytest.skip.Exception as skip:
        skipped = skip  # the others can be tried all the same
    homes = [make_home(version_dir, tmp_path / str(number)) for number in range(len(spoils))]
    for home, spoil in zip(homes, spoils, strict=True):
        (home / "config.toml").write_text(QUICK_TOML)
        work_dir = home / "spool" / "work"
        if spoil is _fill_up:
            work_dir.rmdir()
            work_dir.symlink_to(disk)
        (work_dir / "000001-cups").mkdir(parents=True)
        (work_dir / "000001-cups" / "batch.json").write_text(EMPTY_BATCH)
        spoil(home)
    ended = work(homes)

    assert [(code, said["fault"]) for code, said in ended] == [(1, "home")] * len(homes), ended
    assert "learning.steps" in ended[0][1]["message"]
    if skipped is not None:
        raise skipped
    assert ended[3][1]["retry"] is True
    assert ended[3][1]["message"].startswith("the disk is full (No space left on device: ")


def test_init_on_a_full_disk_says_so_and_publishes_nothing(mount_tmpfs):
    """One sentence instead of a bare number of the system."""
    disk = mount_tmpfs("small", 20 << 20)
    done = subprocess.run(
        [sys.executable, "-m", "daemon.cli", "init", str(disk / "home")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert done.returncode == 1
    assert "Error: the disk is full (" in done.stderr
    assert "Traceback" not in done.stderr
    assert VersionStore(disk / "home" / "serving").versions() == []


def test_init_on_a_disk_too_full_for_an_empty_home_says_so(mount_tmpfs, dynlora):
    """Also before there is a worker that could."""
    disk = mount_tmpfs("small", 4096)
    (disk / "filler").write_bytes(bytes(4096))
    code, _, err = dynlora("init", disk / "home")

    assert code == 1
    assert "Error: the disk is full (No space left on device" in err


EMPTY_BATCH = json.dumps(
    {
        "id": "000001-cups",
        "seq": 1,
        "slug": "cups",
        "kind": "folders",
        "received_at": "2026-01-01T00:00:00+00:00",
        "content_sha256": "0" * 64,
        "classes": [],
        "images": [],
    }
)
