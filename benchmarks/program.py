"""The program itself, as a user calls it."""

import os
import subprocess
import sys
import time
from pathlib import Path


def dynlora(home: Path, *arguments: str, **environment: str) -> float:
    """Run one command of the program on a home; returns its seconds, Python's start included.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "daemon.cli", "--home", str(home), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    if done.returncode:
        raise RuntimeError(f"{arguments} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return time.perf_counter() - started
