"""The demo: drop sample images, watch them learnt, exported and swapped under a live client.

    make demo

Everything is real: `dynlora` runs as a child process as an operator would run it, images are
copied into its inbox, and a client without torch classifies all the while in a thread here. Ends
with a table and exit code 0, or with what went wrong and 1.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import outcome
from rich.console import Console
from traffic import SETTLE_SECONDS, Traffic

from daemon.lock import holder
from daemon.progress import View, showing
from daemon.status import read_status
from deploy.client import Client
from deploy.store import VersionStore

IMAGES = Path(__file__).parent / "images"
KNOWN_NAMES = Path(__file__).parent / "known_names.txt"
HOME = Path("demo-home")
DYNLORA = Path(sys.executable).with_name("dynlora")
FIRST = "shoes"  # the clothing class that is dropped alone
LIVE_TIMEOUT_SECONDS = 180
STOP_TIMEOUT_SECONDS = 30
# A person copying files by hand needs longer waits; nobody here does.
CONFIG = """\
[inbox]
settle_seconds = 1.0
gather_seconds = 2.0
scan_seconds = 5.0
"""


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


def main() -> int:
    """Run all of it and return the exit code."""
    console = Console()
    started = time.monotonic()
    try:
        fresh_home()
        console.print(f"Making a home in {HOME}: the bundled CLIP becomes version 0, with 12 class names")
        dynlora("init", str(HOME), "--classes", str(KNOWN_NAMES))
        (HOME / "config.toml").write_text(CONFIG)
        found = run(console)
    except DemoError as error:
        console.print(f"The demo stopped: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    console.print(f"\n{time.monotonic() - started:.0f} s in all.", highlight=False)
    for problem in found:
        console.print(f"Not as promised: {problem}", style="red", markup=False, soft_wrap=True)
    say_what_is_next(console)
    return 1 if found else 0


def run(console: Console) -> list[str]:
    """Drop, learn, swap and measure; return what was not as promised."""
    store = VersionStore(HOME / "serving")
    with Client(HOME / "serving", threads=1) as client:  # leaves a core to the learner
        before = outcome.score(client, IMAGES)
        with daemon_running() as is_alive, showing() as view:
            traffic = Traffic(client, HOME / "serving", IMAGES / "heldout")
            traffic.start()
            try:
                for number, (what, drop) in enumerate(DROPS, start=1):
                    console.print(f"Dropping {what}")
                    drop()
                    wait_live(client, number, is_alive=is_alive, view=view)
                    time.sleep(SETTLE_SECONDS)  # the end of the swap is measured, too
                    console.print(f"  version {number} is live and has answered")
            finally:
                traffic.stop()
        after = outcome.score(client, IMAGES)
    outcome.show(console, store, traffic.requests, before=before, after=after)
    return outcome.problems(traffic.requests, store)


def drop_first() -> None:
    """One class folder on its own."""
    shutil.copytree(IMAGES / "drop/clothing" / FIRST, HOME / "inbox" / FIRST)


def drop_clothing() -> None:
    """The other class folders, one after the other, as `cp -r` does it."""
    for folder in sorted((IMAGES / "drop/clothing").iterdir()):
        if folder.name != FIRST:
            shutil.copytree(folder, HOME / "inbox" / folder.name)


def submit_groceries() -> None:
    """A whole batch by command."""
    dynlora("--home", str(HOME), "submit", str(IMAGES / "drop/groceries"))


DROPS: tuple[tuple[str, Callable[[], None]], ...] = (
    (f"one class folder alone: {FIRST}", drop_first),
    ("five more clothing folders", drop_clothing),
    ("a batch of six grocery classes with `dynlora submit`", submit_groceries),
)


def fresh_home() -> None:
    """Remove the home of an earlier demo, and nothing else."""
    if not HOME.exists():
        return
    if not (HOME / "format").is_file() or not (HOME / "serving").is_dir():
        raise DemoError(f"{HOME.resolve()} exists and is not a dynlora home. Move it away and try again.")
    if pid := holder(HOME):
        raise DemoError(f"a daemon (pid {pid}) is running in {HOME.resolve()}. Stop it and try again.")
    shutil.rmtree(HOME)


def dynlora(*arguments: str) -> None:
    """Run one command to its end.

    Raises:
        DemoError: it did not end with 0; carries what it said.
    """
    done = subprocess.run([DYNLORA, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DemoError(
            f"`dynlora {' '.join(arguments)}` ended with {done.returncode}: {done.stderr.strip()}"
        )


@contextmanager
def daemon_running() -> Iterator[Callable[[], bool]]:
    """`dynlora run` in a process of its own, stopped with SIGTERM at the end; yields "is it alive?"."""
    with (HOME / "daemon.log").open("wb") as log:
        process = subprocess.Popen([DYNLORA, "--home", str(HOME), "run"], stdout=log, stderr=log)
    try:
        yield lambda: process.poll() is None
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise DemoError(f"the daemon ended with {process.returncode} after SIGTERM, expected 0. {log_tail()}")


def wait_live(client: Client, version: int, *, is_alive: Callable[[], bool], view: View) -> None:
    """Show progress until `version` answers.

    Raises:
        DemoError: the batch was held or failed, the daemon ended, or it takes too long.
    """
    deadline = time.monotonic() + LIVE_TIMEOUT_SECONDS
    while client.version < version:
        for state in ("held", "failed"):
            for batch in (HOME / "spool" / state).glob("[!.]*"):
                raise DemoError(f"batch {batch.name} is {state}, see {batch}. {log_tail()}")
        if not is_alive():
            raise DemoError(f"the daemon ended by itself. {log_tail()}")
        if time.monotonic() > deadline:
            raise DemoError(f"version {version} is not live after {LIVE_TIMEOUT_SECONDS} s. {log_tail()}")
        show_progress(view)
        time.sleep(0.1)
    view.clear()


def show_progress(view: View) -> None:
    """Pass on what the daemon says in its status file."""
    working = read_status(HOME).get("working")
    if working:
        view.update(**working)


def log_tail() -> str:
    """The last lines of the daemon's log, for an error message."""
    lines = (HOME / "daemon.log").read_text(errors="replace").splitlines()[-5:]
    return "\n".join([f"The end of {HOME / 'daemon.log'}:", *lines])


def say_what_is_next(console: Console) -> None:
    """Commands that make sense now."""
    program = f".venv/bin/dynlora --home {HOME}"
    images = os.path.relpath(IMAGES)
    console.print("\nWhat to type next:")
    for command, why in (
        (f"{program} versions", "what was published"),
        (f"{program} show 3", "ranks, exams and the decision, rule by rule"),
        (f"{program} classify {images}/never_dropped/banana/*.jpg", "ask the live version"),
        (f"{program} run", "start the daemon again; then copy folders of your own:"),
        (f"cp -r my-class {HOME}/inbox/", "the folder's name is what the model is told"),
        (f"{program} rollback --to 2", "go back; `unpin` releases"),
    ):
        console.print(f"  {command}", f"[dim]# {why}[/]", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
