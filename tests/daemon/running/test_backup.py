"""The commands of the page on backup and restore, typed as they stand there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.store import VersionStore
from tests.daemon.running.programs import ROOT

PAGE = ROOT / "docs" / "operations.md"


def blocks_of(title: str) -> list[str]:
    """The shell blocks of a section of the page."""
    section = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    [text] = [part for part in section if part.startswith(f"{title}\n")]
    return re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def type_in(block: str, folder: Path) -> str:
    """Run a block in a shell in which `dynlora` is this program; what it printed."""
    shell = f'set -e\ndynlora() {{ "{sys.executable}" -m daemon.cli "$@"; }}\n{block}'
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DYNLORA_")}
    done = subprocess.run(
        ["sh", "-c", shell], cwd=folder, env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.nightly
def test_a_home_comes_back_from_its_backup_with_every_version(home, publish_random_version, tmp_path):
    """Made small, the home lost, restored under another name; what was thinned is rebuilt bit for bit."""
    (home.parent / "home").rename(tmp_path / "dynlora-home")
    home = tmp_path / "dynlora-home"
    for seed in (1, 2, 3):
        publish_random_version(home / "serving", seed)
    weights = (home / "serving/versions/1/weights.safetensors").read_bytes()
    backup, restore = blocks_of("Backup and restore")

    assert "thinned: 1;" in type_in(backup, tmp_path)
    assert not VersionStore(tmp_path / "backup/dynlora-home/serving").is_full(1)
    shutil.rmtree(home)
    said = type_in(restore, tmp_path)

    assert "version 3" in said
    store = VersionStore(tmp_path / "restored-home" / "serving")
    assert (store.current(), store.full_versions()) == (3, [0, 1, 2, 3])
    assert (store.path(1) / "weights.safetensors").read_bytes() == weights
