"""The server's life under a real systemd; run inside of the lab as root. One JSON object per finding."""

import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from inside import HOME, INBOX, SAMPLES, SERVER, UNIT, events, install, report, run, shown, wait

URL = "http://127.0.0.1:8000"
TOKEN = "0123456789abcdef0123456789abcdef"
CLIENTS = 4


def ask(path: str, *, token: str | None = TOKEN) -> int:
    """The status of one answer, over a connection of its own."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{URL}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def start() -> None:
    """The server, with its token as a credential."""
    install()
    store = Path("/etc/credstore")
    store.mkdir(mode=0o700, exist_ok=True)
    (store / "dynlora-token").write_text(TOKEN)
    (store / "dynlora-token").chmod(0o600)
    run("systemctl", "enable", "--now", SERVER)
    codes = {"without a token": ask("/version", token=None), "with it": ask("/version")}
    status = shown("StatusText", SERVER)
    report(step="start", active=shown("ActiveState", SERVER), status=status, codes=codes)


def see_less() -> None:
    """What the server's process may read: the versions, and none of the images."""
    pid = shown("MainPID", SERVER)
    looks = {}
    for name in ("serving/current/manifest.json", "inbox", "spool"):
        command = ["nsenter", "--target", pid, "--mount", "--", "runuser", "-u", "dynlora-serve", "--"]
        look = "cat" if name.endswith("json") else "ls"
        try:
            run(*command, look, str(HOME / name))
            looks[name] = "read"
        except AssertionError:
            looks[name] = "refused"
    report(step="sight", looks=looks)


def follow() -> None:
    """What the daemon publishes beside it is served, and told to systemd."""
    run("systemctl", "start", UNIT)
    run("cp", "-r", str(SAMPLES / "clothing" / "dress"), f"{INBOX}/", user="alice")
    wait("a version is published", lambda: events("published"))
    run("systemctl", "stop", UNIT)
    live = json.loads((HOME / "serving/current/manifest.json").read_text())["version"]
    wait("it is served", lambda: shown("StatusText", SERVER) == f"serving version {live}")
    report(step="follow", live=live, code=ask("/v2/models/vision/versions/1"))


def restart() -> None:
    """Three restarts under clients that ask all the time, each time over a new connection."""
    codes: list[int] = []
    failed: list[str] = []
    pids, is_over = {shown("MainPID", SERVER)}, threading.Event()

    def client() -> None:
        while not is_over.is_set():
            try:
                codes.append(ask("/version"))
            except OSError as error:
                failed.append(repr(error))

    clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in clients:
        thread.start()
    for _ in range(3):
        answers = len(codes)
        run("systemctl", "restart", SERVER)
        wait("it answers again", lambda answers=answers: len(codes) > answers + 20)
        pids.add(shown("MainPID", SERVER))
    is_over.set()
    for thread in clients:
        thread.join()
    failed += [str(code) for code in codes if code != 200]
    report(step="restart", answers=len(codes), failed=failed, processes=len(pids))


def hang() -> None:
    """A server that stands still is killed by the watchdog; the next one answers who asks meanwhile."""
    override = Path("/etc/systemd/system") / f"{SERVER}.d"
    override.mkdir(exist_ok=True)
    (override / "watchdog.conf").write_text("[Service]\nWatchdogSec=3\n")
    run("systemctl", "daemon-reload")
    run("systemctl", "restart", SERVER)
    first = shown("MainPID", SERVER)
    os.kill(int(first), signal.SIGSTOP)
    code = ask("/version")
    journal = run("journalctl", "--no-pager", "--unit", SERVER, "--output", "cat")
    is_new = shown("MainPID", SERVER) != first
    report(step="watchdog", told="Watchdog timeout" in journal, code=code, is_new=is_new)


def stop() -> None:
    """Stopped, started again by the next request, and stopped in time."""
    run("systemctl", "stop", SERVER)
    before = shown("ActiveState", SERVER)
    report(step="on demand", before=before, code=ask("/version"))
    started = time.monotonic()
    run("systemctl", "stop", SERVER)
    seconds = time.monotonic() - started
    journal = run("journalctl", "--no-pager", "--unit", SERVER, "--output", "cat")
    said = {"traceback": "Traceback" in journal, "drained": "draining" in journal}
    report(step="stop", seconds=seconds, result=shown("Result", SERVER), **said)


if __name__ == "__main__":
    for part in (start, see_less, follow, restart, hang, stop):
        part()
