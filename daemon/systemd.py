"""`dynlora systemd`: what daemon.unit_files has filled in is written, and taken away again."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from daemon.errors import DaemonError
from daemon.unit_files import Target, render
from deploy import atomic

Run = Callable[[list[str]], None]


class SystemdError(DaemonError):
    """systemd is not there, or refused."""


def systemd_version() -> int:
    """The number of the systemd that is installed.

    Raises:
        SystemdError: there is none.
    """
    program = shutil.which("systemctl")
    if program is None:
        raise SystemdError(
            "systemctl is not there: this machine has no systemd; start `dynlora run` otherwise"
        )
    found = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    words = found.stdout.split()
    return int(words[1]) if len(words) > 1 and words[1].isdecimal() else 0


def install(target: Target, run: Run) -> list[Path]:
    """Write the files, make user and inbox, let systemd read the units; returns what was written.

    Raises:
        SystemdError: a file cannot be written or a command of systemd failed; says which and why.
    """
    written = []
    for path, content in render(target).items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_text(path, content)
            path.chmod(0o644)
        except OSError as error:
            hint = "" if target.is_user else "; run it as root, or use --user"
            raise SystemdError(f"{path} cannot be written: {error.strerror}{hint}") from error
        written.append(path)
    if not target.is_user:
        run(["systemd-sysusers", str(target.root / "etc/sysusers.d/dynlora.conf")])
        run(["systemd-tmpfiles", "--create", str(target.root / "etc/tmpfiles.d/dynlora.conf")])
    run(target.manager("daemon-reload"))
    return written


def uninstall(target: Target, run: Run) -> list[Path]:
    """Stop the units and remove their files; home, user and group stay. Returns what was removed.

    Raises:
        SystemdError: nothing is installed there, or a file cannot be removed.
    """
    there = [path for path in render(target) if path.exists()]
    if not there:
        raise SystemdError(f"nothing is installed at {target.unit_path}")
    units = [path.name for path in there if path.parent == target.unit_dir]
    run(target.manager("disable", "--now", *units))
    for path in there:
        try:
            path.unlink()
        except OSError as error:
            raise SystemdError(f"{path} cannot be removed: {error.strerror}; run it as root") from error
    run(target.manager("daemon-reload"))
    return there


def run_command(command: list[str]) -> None:
    """Run one of systemd's commands.

    Raises:
        SystemdError: it failed; with its own words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SystemdError(f"{' '.join(command)} failed: {error}") from error
    if done.returncode:
        raise SystemdError(f"{' '.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
