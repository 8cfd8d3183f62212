"""Unit files of daemon and server, filled in for this machine. Pure: nothing is written here.

Knows where systemd wants its files and nothing of what daemon and server do.
"""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

UNIT = "dynlora.service"
SERVE_UNIT = "dynlora-serve.service"
SOCKET_UNIT = "dynlora-serve.socket"
SYSTEM_HOME = Path("/var/lib/dynlora")
MEMORY_HIGH = "75%"  # of the machine; beyond it the kernel slows the daemon down before anything else suffers
_NOTIFY_RELOAD_SINCE = 253
_NOT_SEEN_INSIDE = (Path("/root"), Path("/tmp"), Path("/var/tmp"))  # noqa: S108 - named, not used
_NOT_SERVED = ("inbox", "spool", "exams", "requests")  # what the server must not even read, in the home
_USER_HARDENING = "NoNewPrivileges=yes\nLockPersonality=yes\nRestrictRealtime=yes"
_SOCKET_ACCESS = """\
SocketGroup=dynlora
# The filter of the network goes with the socket, not with the process that answers on it.
IPAddressDeny=any
IPAddressAllow=localhost"""
_CREDENTIAL = """\
# The token, if there is one: /etc/credstore/dynlora-token, which only root need be able to read.
LoadCredential=dynlora-token:dynlora-token"""
_PLAIN = re.compile(r"[\w/.:+,=@-]+", re.ASCII)
_PLACE = re.compile(r"@([a-z_]+)@")


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
    def unit_dir(self) -> Path:
        """Where the unit files go."""
        if self.is_user:
            config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
            return config / "systemd/user"
        return self.root / "etc/systemd/system"

    @property
    def unit_path(self) -> Path:
        """Where the daemon's unit file goes."""
        return self.unit_dir / UNIT

    def manager(self, *words: str) -> list[str]:
        """A systemctl command line for the right instance."""
        return ["systemctl", *(["--user"] if self.is_user else []), *words]


def render(target: Target) -> dict[Path, str]:
    """{where: content} of every file that an installation writes."""
    files = {
        target.unit_path: _daemon_unit(target),
        target.unit_dir / SERVE_UNIT: _server_unit(target),
        target.unit_dir / SOCKET_UNIT: _socket_unit(target),
    }
    if not target.is_user:
        values = {"home": _word(target.home), "inbox": _word(target.home / "inbox")}
        files[target.root / "etc/sysusers.d/dynlora.conf"] = _fill("dynlora.sysusers", values)
        files[target.root / "etc/tmpfiles.d/dynlora.conf"] = _fill("dynlora.tmpfiles", values)
    return files


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


def _daemon_unit(target: Target) -> str:
    notify_reload = target.version >= _NOTIFY_RELOAD_SINCE
    values = {
        "type": "notify-reload" if notify_reload else "notify",
        "reload": "" if notify_reload else "ExecReload=/bin/kill -HUP $MAINPID",
        "memory_high": MEMORY_HIGH,
    }
    if target.is_user:
        values |= {"user": "", "directories": "", "cache": "%C/dynlora", "hardening": _USER_HARDENING}
    else:
        values |= {"user": "User=dynlora\nGroup=dynlora", "cache": "/var/cache/dynlora"}
        values["directories"] = _directories(target.home)
        values["hardening"] = _hardening(
            target,
            paths=f"ReadWritePaths={_word(target.home)}",
            network="# Models are fetched by `dynlora init`, before; learning needs no network.",
        )
    return _unit(UNIT, target, values)


def _server_unit(target: Target) -> str:
    if target.is_user:
        values = {"user": "", "credential": "", "hardening": _USER_HARDENING}
    else:
        values = {
            "user": "User=dynlora-serve\nGroup=dynlora-serve",
            "credential": _CREDENTIAL,
        }
        hidden = " ".join(_word(f"-{target.home / name}") for name in _NOT_SERVED)
        values["hardening"] = _hardening(
            target,
            paths=f"InaccessiblePaths={hidden}",
            network="# It answers on the socket that systemd holds, and needs no network of its own.",
        )
    return _unit(SERVE_UNIT, target, values)


def _socket_unit(target: Target) -> str:
    access = "" if target.is_user else _SOCKET_ACCESS
    return _unit(SOCKET_UNIT, target, {"access": access})


def _unit(name: str, target: Target, values: dict[str, str]) -> str:
    """A unit file with its own places filled, and those that several of them have."""
    common = {
        "program": f"{_word(target.python)} -m daemon.cli",
        "home": _word(target.home, is_argument=True),
        "store": _word(target.home / "serving", is_argument=True),
        "target": "default.target" if target.is_user else "multi-user.target",
    }
    return re.sub(r"\n{3,}", "\n\n", _fill(name, common | values))


def _hardening(target: Target, *, paths: str, network: str) -> str:
    """The restrictions that daemon and server share, with what differs."""
    return _fill("hardening.conf", {"paths": paths, "protect_home": _homes(target), "network": network})


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


def _word(path: Path | str, *, is_argument: bool = False) -> str:
    """A path as one word of a unit file, whatever is in its name: systemd splits, unescapes and fills in.

    Args:
        is_argument: of a command, where variables are filled in, too.
    """
    text = str(path)
    if _PLAIN.fullmatch(text):
        return text
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text.replace("$", "$$") if is_argument else text}"'


def _fill(name: str, values: Mapping[str, str]) -> str:
    """A file of daemon/units with its places filled; systemd's own `@system-service` is none of them."""
    text = resources.files("daemon").joinpath("units", name).read_text(encoding="utf-8")
    return _PLACE.sub(lambda match: values[match[1]], text)
