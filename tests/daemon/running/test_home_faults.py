"""What is wrong with the installation or the home is told as that, in one sentence, and harms no batch."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from daemon import cli_feed
from deploy.store import VersionStore
from tests.daemon.running.programs import ROOT


def test_init_without_torch_says_what_to_install_and_makes_nothing(dynlora, tmp_path, monkeypatch):
    """The same command works once it is installed."""
    monkeypatch.setattr(cli_feed, "find_spec", lambda name: None if name == "torch" else name)
    code, _, err = dynlora("init", tmp_path / "home")

    assert code == 1
    assert "torch is not installed" in err
    assert "pip install 'dynlora[daemon]'" in err
    assert not (tmp_path / "home").exists()


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


def _cut_weights(home):
    path = home / "serving" / "versions" / "0" / "weights.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def work(home, *options):
    """Run the real worker on the batch of this file; its exit code and the last thing it said."""
    arguments = ["adapt", "--home", home, "--batch", "000001-cups", "--parent", "0", *options]
    done = subprocess.run(
        [sys.executable, "-m", "daemon.worker", "--parent-pid", str(os.getpid()), *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("spoil", [_misspell, _lose_version, _cut_weights])
def test_a_worker_blames_the_home_for_its_configuration_and_its_versions(quick_home, spoil):
    """A typo, a version that is gone, or live weights cut short: no batch is to blame."""
    spoil(quick_home)
    batch_dir = quick_home / "spool" / "work" / "000001-cups"
    batch_dir.mkdir(parents=True)
    (batch_dir / "batch.json").write_text(EMPTY_BATCH)
    code, said = work(quick_home, "--config", quick_home / "config.toml")

    assert (code, said["fault"]) == (1, "home"), said


def test_a_worker_blames_the_home_for_a_full_disk(quick_home, mount_tmpfs):
    """No attempt is lost to it, and the sentence says what to do."""
    batch_dir = quick_home / "spool" / "work" / "000001-cups"
    batch_dir.parent.rmdir()
    disk = mount_tmpfs("small", 8192)  # two pages
    batch_dir.parent.symlink_to(disk)
    batch_dir.mkdir()
    (batch_dir / "batch.json").write_text(EMPTY_BATCH)
    (disk / "filler").write_bytes(bytes(4096))
    code, said = work(quick_home)

    assert (code, said["fault"], said["retry"]) == (1, "home", True), said
    assert said["message"].startswith("the disk is full (No space left on device: ")


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
