"""What `make dist` makes: all that belongs in it and nothing else, and it can be installed."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from daemon.unit_archive import PYTHON, pack
from daemon.unit_files import SYSTEM_HOME, Target

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("daemon", "deploy", "dynlora")


def run(*command: object, cwd: Path, **environ: str) -> str:
    """Run a command that has to succeed; what it printed."""
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=os.environ | environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked(*folders: str) -> list[str]:
    """Files of the repository."""
    return run("git", "ls-files", "-z", *folders, cwd=ROOT).split("\0")[:-1]


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """What `make dist` puts there, run on a copy of what is tracked; the environment is used as it is."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout: nobody knows which files belong to it")
    tree = tmp_path_factory.mktemp("tree")
    for name in tracked(*PACKAGES, "Makefile", "pyproject.toml", "README.md", "LICENSE"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    stamp = f"{sys.prefix}/.installed"
    run("make", "-o", stamp, f"VENV={sys.prefix}", "dist", cwd=tree, PYTHONPATH="")
    return tree / "dist"


def test_the_archive_of_units_has_what_an_installation_writes(tmp_path):
    """Unit files, user and inbox, owned by root, for the environment in /opt."""
    names = pack(tmp_path / "units.tar.gz", Target(home=SYSTEM_HOME, python=PYTHON))
    with tarfile.open(tmp_path / "units.tar.gz") as archive:
        assert archive.getnames() == names == sorted(names)
        members = {member.name: member for member in archive.getmembers()}
        unit = archive.extractfile("etc/systemd/system/dynlora-serve.service").read().decode()

    assert {Path(name).name for name in names} == {
        *("dynlora.service", "dynlora-serve.service", "dynlora-serve.socket", "dynlora.conf")
    }
    assert {(member.uid, member.gid, member.mode) for member in members.values()} == {(0, 0, 0o644)}
    assert "ExecStart=/opt/dynlora/bin/python -m daemon.cli serve --store /var/lib/dynlora/serving\n" in unit


@pytest.mark.nightly
def test_the_wheel_has_every_file_of_the_packages_and_no_other(dist):
    """Units, alert rules, pages and the bundled model too; no tests, no benchmarks."""
    [wheel] = dist.glob("dynlora-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]

    assert found == set(tracked(*PACKAGES))
    assert len(licences) == 1
    assert len(list(dist.glob("dynlora-units-*.tar.gz"))) == 1


@pytest.mark.nightly
def test_the_wheel_can_be_installed_and_its_program_runs(dist, tmp_path):
    """In a fresh environment, with this one's dependencies beside it; units come out of the wheel."""
    [wheel] = dist.glob("dynlora-*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    run(tmp_path / "venv/bin/pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    beside = {"PYTHONPATH": sysconfig.get_paths()["purelib"]}
    program = tmp_path / "venv/bin/dynlora"

    where = run(
        tmp_path / "venv/bin/python", "-c", "import daemon; print(daemon.__file__)", cwd=tmp_path, **beside
    )
    assert Path(where.strip()).is_relative_to(tmp_path / "venv")
    assert run(program, "--version", cwd=tmp_path, **beside).startswith("dynlora, version ")
    assert "Usage: dynlora" in run(program, "--help", cwd=tmp_path, **beside)
    if shutil.which("systemctl"):
        assert "[Socket]" in run(program, "systemd", "install", "--dry-run", cwd=tmp_path, **beside)
