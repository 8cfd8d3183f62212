"""The daemon's life under a real systemd; run inside of the lab as root. One JSON object per finding."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

from inside import HOME, INBOX, SAMPLES, UNIT, configure, dynlora, events, install, report, run, shown, wait


def start() -> None:
    """A service that said it is ready."""
    install()
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


def outlast() -> None:
    """A home is away for longer than a few starts take; the daemon is there again when it is."""
    format_file, away = HOME / "format", HOME / "format-is-away"
    before = int(shown("NRestarts"))
    format_file.rename(away)
    os.kill(int(shown("MainPID")), signal.SIGKILL)
    wait("it failed to start seven times", lambda: int(shown("NRestarts")) >= before + 7)
    state = shown("ActiveState")
    away.rename(format_file)
    wait("it is there again", lambda: shown("ActiveState") == "active")
    report(step="outlast", meanwhile=state, status=shown("StatusText"))


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
    left = [*map(str, Path("/etc").glob("*/dynlora.conf"))]
    left += map(str, Path("/etc/systemd/system").glob("dynlora*.so*"))
    report(step="uninstall", left=left, home=(HOME / "serving/current").exists())


if __name__ == "__main__":
    for part in (start, drop_as_alice, drop_in_private, reload_and_restart, hang, outlast, stop):
        part()
