"""Unit files of the daemon: filled in for this machine, written, taken away again.

Knows where systemd wants its files and nothing of what the daemon does. `render` is pure, so that a dry run
shows exactly what an installation writes.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from daemon.errors import DaemonError
from deploy import atomic

UNIT = "dynlora.service"
SYSTEM_HOME = Path("/var/lib/dynlora")
MEMORY_HIGH = "75%"  # of the machine; beyond it the kernel slows the daemon down before anything else suffers
_NOTIFY_RELOAD_SINCE = 253
_NOT_SEEN_INSIDE = (Path("/root"), Path("/tmp"), Path("/var/tmp"))  # noqa: S108 - named, not used
_PLACE = re.compile(r"@([a-z_]+)@")

Run = Callable[[list[str]], None]


class SystemdError(DaemonError):
    """systemd is not there, or refused."""


@dataclass(frozen=True)
class Target:
    """What is installed where.

    Attributes:
        home: the daemon's home directory, absolute.
        is_user: into the user's own systemd instead of the system's.
        root: another root of the file system, for packages and tests.
        python: the interpreter that has dynlora.
        version: of systemd.
    """

    home: Path
    is_user: bool = False
    root: Path = Path("/")
    python: Path = Path(sys.executable)
    version: int = 252

    @property
    def unit_path(self) -> Path:
        """Where the unit file goes."""
        if self.is_user:
            config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
            return config / "systemd/user" / UNIT
        return self.root / "etc/systemd/system" / UNIT

    def manager(self, *words: str) -> list[str]:
        """A systemctl command line for the right instance."""
        return ["systemctl", *(["--user"] if self.is_user else []), *words]


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


def render(target: Target) -> dict[Path, str]:
    """{where: content} of every file that an installation writes."""
    files = {target.unit_path: _unit(target)}
    if not target.is_user:
        values = {"home": str(target.home)}
        files[target.root / "etc/sysusers.d/dynlora.conf"] = _fill("dynlora.sysusers", values)
        files[target.root / "etc/tmpfiles.d/dynlora.conf"] = _fill("dynlora.tmpfiles", values)
    return files


def install(target: Target, run: Run) -> list[Path]:
    """Write the files, make user and inbox, let systemd read the unit; returns what was written.

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
    """Stop the unit and remove its files; home, user and group stay. Returns what was removed.

    Raises:
        SystemdError: nothing is installed there, or a file cannot be removed.
    """
    there = [path for path in render(target) if path.exists()]
    if not there:
        raise SystemdError(f"nothing is installed at {target.unit_path}")
    run(target.manager("disable", "--now", UNIT))
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


def cautions(target: Target) -> list[str]:
    """What will not work although everything can be written, in a sentence each."""
    if target.is_user:
        return []
    return [
        f"{path} lies in {folder}, which the unit does not see: make an environment in /opt/dynlora, say, "
        "from the system's Python, and run this command from there"
        for path in dict.fromkeys((target.python, target.python.resolve()))
        for folder in _NOT_SEEN_INSIDE
        if _is_in(path, folder)
    ]


def _unit(target: Target) -> str:
    notify_reload = target.version >= _NOTIFY_RELOAD_SINCE
    values = {
        "type": "notify-reload" if notify_reload else "notify",
        "reload": "" if notify_reload else "ExecReload=/bin/kill -HUP $MAINPID",
        "program": f"{target.python} -m daemon.cli",
        "home": str(target.home),
        "memory_high": MEMORY_HIGH,
        "target": "default.target" if target.is_user else "multi-user.target",
    }
    if target.is_user:
        values |= {"user": "", "directories": "", "cache": "%C/dynlora"}
        values["hardening"] = "NoNewPrivileges=yes\nLockPersonality=yes\nRestrictRealtime=yes"
    else:
        values |= {"user": "User=dynlora\nGroup=dynlora", "cache": "/var/cache/dynlora"}
        values["directories"] = _directories(target.home)
        places = {"writable": str(target.home), "protect_home": _homes(target)}
        values["hardening"] = _fill("hardening.conf", places)
    text = _fill("dynlora.service", values)
    return re.sub(r"\n{3,}", "\n\n", text)


def _directories(home: Path) -> str:
    """Directories that systemd makes for us, with the right owner."""
    lines = ["RuntimeDirectory=dynlora", "CacheDirectory=dynlora", "LogsDirectory=dynlora"]
    if home == SYSTEM_HOME:
        lines = ["StateDirectory=dynlora", "StateDirectoryMode=0750", *lines]
    return "\n".join(lines)


def _homes(target: Target) -> str:
    """`yes`, unless our home or our Python lies below /home."""
    needed = any(
        _is_in(path, Path("/home")) for path in (target.home, target.python, target.python.resolve())
    )
    return "read-only" if needed else "yes"


def _is_in(path: Path, folder: Path) -> bool:
    return path.absolute().is_relative_to(folder)


def _fill(name: str, values: Mapping[str, str]) -> str:
    """A file of daemon/units with its places filled; systemd's own `@system-service` is none of them."""
    text = resources.files("daemon").joinpath("units", name).read_text(encoding="utf-8")
    return _PLACE.sub(lambda match: values[match[1]], text)
