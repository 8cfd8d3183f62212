"""Served is only what a trusted key has signed, by one process or several."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.signing import SigningKey
from tests.deploy.server.servers import ROOT, serving_process
from tests.deploy.swaps import point, wait_for
from tests.deploy.test_signing import make_key

pytest.importorskip("cryptography", reason="signatures need the signing extra")


def failed_start(serving: Path, *options: str) -> str:
    """What a server says that cannot start."""
    command = [sys.executable, "-m", "daemon.cli", "serve", "--store", str(serving), "--port", "0"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*command, *options], check=False, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr
    return ended.stderr


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_version_without_a_trusted_signature_is_not_served(
    serving: Path, tmp_path: Path, workers: str
) -> None:
    """Neither at the start nor later, when the version before goes on answering; once signed it is."""
    private, public = make_key(tmp_path, "own")
    stranger, _ = make_key(tmp_path, "stranger")
    options = ("--trust", str(public), "--workers", workers)
    assert "versions/0 is not signed: expected model.sig" in failed_start(serving, *options)
    SigningKey.load(private).sign_version(serving / "versions/0")
    SigningKey.load(stranger).sign_version(serving / "versions/1")

    with serving_process(serving, *options) as server:
        point(serving, 1)
        wait_for(lambda: "not with a trusted key" in server.log)
        assert server.version() == 0
        SigningKey.load(private).sign_version(serving / "versions/1")
        wait_for(lambda: server.version() == 1)


def test_keys_that_cannot_be_read_are_told_before_anything_starts(serving: Path, tmp_path: Path) -> None:
    """Serving without them would be what was not asked for."""
    missing = tmp_path / "trusted.pub"

    assert f"the key {missing} cannot be read" in failed_start(serving, "--trust", str(missing))
