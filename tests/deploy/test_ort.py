"""Nobody is told what is served: ONNX Runtime's telemetry is off, in whatever way it is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.ort import TELEMETRY_OFF
from tests.deploy.swaps import PICTURES

ROOT = Path(__file__).resolve().parents[2]
ASK = """
import sys
from deploy.client import Client

with Client(sys.argv[1]) as client:
    [answer] = client.classify([sys.stdin.buffer.read()])
    print(answer.version)
"""


def run_in(home: Path, code: str, *arguments: str, stdin: bytes = b"", **extra: str) -> str:
    """What a program prints whose home directory is `home`, and whose environment turns nothing off."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "PATH", "LD_"))}
    environment = kept | {"HOME": str(home), "PYTHONPATH": str(ROOT)} | extra
    program = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        program, env=environment, input=stdin, capture_output=True, check=False, cwd=home, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def test_a_client_leaves_nothing_in_the_home_of_whoever_runs_it(version_dir: Path, tmp_path: Path) -> None:
    """No identifier of the machine, no database of events: the folder is as empty as before."""
    assert run_in(tmp_path, ASK, str(version_dir.parent.parent), stdin=PICTURES[0]) == "0"

    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(("given", "counts"), [({}, "1"), ({TELEMETRY_OFF: "true"}, "true")])
def test_what_an_operator_has_set_counts(given: dict[str, str], counts: str, tmp_path: Path) -> None:
    """The variable is set where it is not set yet, and never changed."""
    code = f"import os, deploy.ort; print(os.environ['{TELEMETRY_OFF}'])"

    assert run_in(tmp_path, code, **given) == counts
