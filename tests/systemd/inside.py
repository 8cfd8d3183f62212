"""What the scenarios share that run inside of the lab, as root. One JSON object per finding."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

HOME = Path("/var/lib/dynlora")
INBOX = HOME / "inbox"
SAMPLES = Path("/opt/src/examples/demo/images/drop")
UNIT = "dynlora.service"
SERVER = "dynlora-serve.service"
PATH = ":".join(["/opt/src", *map(str, Path("/opt/venv/lib").glob("python*/site-packages"))])
# The interpreter that was moved to /opt must not find another libpython of the same name.
VARIABLES = f"PYTHONPATH={PATH} LD_LIBRARY_PATH=/opt/python/lib"
PATIENCE = 240.0
CONFIG = """\
[inbox]
settle_seconds = 1.0
gather_seconds = 1.5
scan_seconds = 2.0
[learning]
steps = {steps}
checkpoint_seconds = 1.0
[exam]
min_gain = 0.0
alpha = 0.0001
"""


def run(*command: str, user: str | None = None) -> str:
    """Run a command, perhaps as another user; its output."""
    prefix = ["runuser", "-u", user, "--"] if user else []
    done = subprocess.run([*prefix, *command], capture_output=True, text=True, check=False, timeout=PATIENCE)
    if done.returncode and command[0] == "systemctl":
        subprocess.run(["journalctl", "--no-pager", "-n", "40"], check=False)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def dynlora(*words: str, user: str | None = None) -> str:
    """Run the program."""
    return run(sys.executable, "-m", "daemon.cli", *words, user=user)


def shown(key: str, unit: str = UNIT) -> str:
    """A property of the unit."""
    return run("systemctl", "show", "--value", "--property", key, unit).strip()


def wait(what: str, is_true) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + PATIENCE
    while not is_true():
        if time.monotonic() > deadline:
            subprocess.run(["journalctl", "--no-pager", "-n", "60"], check=False)
            subprocess.run(["ls", "-lR", str(INBOX), str(HOME / "spool")], check=False)
            raise SystemExit(f"waited in vain until {what}")
        time.sleep(0.1)


def events(name: str) -> list[dict]:
    """The daemon's events of that name."""
    path = HOME / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [entry for entry in map(json.loads, lines) if entry["event"] == name]


def report(**finding: object) -> None:
    """For the test outside."""
    print(json.dumps(finding), flush=True)


def configure(steps: int) -> None:
    """Write the configuration as the daemon's user finds it."""
    (HOME / "config.toml").write_text(CONFIG.format(steps=steps))
    (HOME / "config.toml").chmod(0o644)


def install() -> None:
    """From nothing to units, their users, a home with version 0, and alice who may drop."""
    os.environ["PYTHONPATH"] = PATH
    run("useradd", "--create-home", "alice")
    dynlora("systemd", "install")
    run("usermod", "--append", "--groups", "dynlora", "alice")
    for unit in (UNIT, SERVER):
        drop_in = Path("/etc/systemd/system") / f"{unit}.d"
        drop_in.mkdir()
        (drop_in / "lab.conf").write_text(f"[Service]\nEnvironment={VARIABLES}\nRestartSec=1\n")
    run("systemctl", "daemon-reload")
    dynlora("init", str(HOME), user="dynlora")
    configure(steps=30)
