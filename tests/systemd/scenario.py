"""A service's life under a real systemd; run inside of the lab as root. One JSON object per finding."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HOME = Path("/var/lib/dynlora")
INBOX = HOME / "inbox"
SAMPLES = Path("/opt/src/examples/demo/images/drop")
UNIT = "dynlora.service"
PATH = ":".join(["/opt/src", *map(str, Path("/opt/venv/lib").glob("python*/site-packages"))])
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
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def dynlora(*words: str, user: str | None = None) -> str:
    """Run the program."""
    return run(sys.executable, "-m", "daemon.cli", *words, user=user)


def shown(key: str) -> str:
    """A property of the unit."""
    return run("systemctl", "show", "--value", "--property", key, UNIT).strip()


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
    """From nothing to a service that said it is ready."""
    run("useradd", "--create-home", "alice")
    dynlora("systemd", "install")
    run("usermod", "--append", "--groups", "dynlora", "alice")
    drop_in = Path("/etc/systemd/system") / f"{UNIT}.d"
    drop_in.mkdir()
    (drop_in / "lab.conf").write_text(f"[Service]\nEnvironment=PYTHONPATH={PATH}\nRestartSec=1\n")
    run("systemctl", "daemon-reload")
    dynlora("init", str(HOME), user="dynlora")
    configure(steps=30)
    run("systemctl", "enable", "--now", UNIT)
    report(step="start", active=shown("ActiveState"), status=shown("StatusText"), type=shown("Type"))


def drop_as_alice() -> None:
    """Three ways of another user to bring images, one batch each, all learnt."""
    spool = Path("/home/alice/pictures")
    shutil.copytree(SAMPLES / "clothing", spool)
    run("chown", "-R", "alice:alice", str(spool))
    run("chmod", "-R", "u=rwX,go=rX", str(spool))
    ways = {"cp -r": "dress", "rsync -a": "pants", "mv": "shoes"}
    if shutil.which("rsync") is None:
        del ways["rsync -a"]
    for count, (way, name) in enumerate(ways.items(), 1):
        command = f"{way} {spool / name} {INBOX}/"
        run("sh", "-c", f"umask 022; {command}", user="alice")
        seen = []

        def is_over(count: int = count, seen: list[str] = seen) -> bool:
            seen.append(shown("StatusText"))
            return len(events("published")) + len(events("failed")) + len(events("held")) >= count

        wait(f"{command} is learnt", is_over)
        last = [*events("published"), *events("failed"), *events("held")][-1]
        report(step="drop", way=way, outcome=last["event"], why=last.get("why"), status=sorted(set(seen)))


def drop_in_private() -> None:
    """What nobody but alice may read is told, and learnt once the rights are given."""
    before = len(events("published")) + len(events("held"))
    private = Path("/home/alice/pictures/t-shirt")
    run("chmod", "-R", "go=", str(private))
    run("cp", "-rp", str(private), f"{INBOX}/", user="alice")

    def problems() -> list[str]:
        found = json.loads(dynlora("--home", str(HOME), "--json", "status"))["inbox"]
        return [sentence for sentence in found if "t-shirt" in sentence]  # others tell of what `mv` left

    wait("the rights are complained of", problems)
    [sentence] = problems()
    run("chmod", "-R", "go=rX", f"{INBOX}/t-shirt", user="alice")
    wait("it is learnt", lambda: len(events("published")) + len(events("held")) > before)
    report(step="private", sentence=sentence)


def reload_and_restart() -> None:
    """A reload while it runs; a restart in the middle of a batch that then goes on."""
    configure(steps=400)
    run("systemctl", "reload", UNIT)
    wait("the configuration is reloaded", lambda: events("reloaded"))
    report(step="reload", changed=events("reloaded")[-1]["changed"], active=shown("ActiveState"))
    before = len(events("published"))
    run("cp", "-r", str(SAMPLES / "clothing" / "hat"), f"{INBOX}/", user="alice")
    wait("it learns", lambda: "step" in shown("StatusText"))
    wait("there is a checkpoint", lambda: list((HOME / "spool/work").glob("*/checkpoint/*")))
    started = time.monotonic()
    run("systemctl", "restart", UNIT)
    seconds = time.monotonic() - started
    wait("the batch is live", lambda: len(events("published")) > before)
    report(step="restart", seconds=seconds, interrupted=len(events("stopped")), again=len(events("adapting")))


def hang() -> None:
    """A daemon that stands still is killed by the watchdog and started anew."""
    (Path("/etc/systemd/system") / f"{UNIT}.d/watchdog.conf").write_text("[Service]\nWatchdogSec=3\n")
    run("systemctl", "daemon-reload")
    run("systemctl", "restart", UNIT)
    os.kill(int(shown("MainPID")), signal.SIGSTOP)
    wait("it is restarted", lambda: shown("NRestarts") == "1" and shown("ActiveState") == "active")
    journal = run("journalctl", "--no-pager", "--unit", UNIT, "--output", "cat")
    report(step="watchdog", told="Watchdog timeout" in journal, status=shown("StatusText"))


def stop() -> None:
    """The end, in order and in time; then nothing of the unit is left."""
    started = time.monotonic()
    run("systemctl", "stop", UNIT)
    journal = run("journalctl", "--no-pager", "--unit", UNIT, "--output", "cat")
    report(
        step="stop",
        seconds=time.monotonic() - started,
        result=shown("Result"),
        published="published batch=" in journal,
        traceback="Traceback" in journal,
    )
    dynlora("systemd", "uninstall")
    left = [str(path) for path in Path("/etc").glob("*/dynlora.conf")]
    report(step="uninstall", left=left, home=(HOME / "serving/current").exists())


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = PATH
    for part in (install, drop_as_alice, drop_in_private, reload_and_restart, hang, stop):
        part()
