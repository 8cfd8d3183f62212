"""From drop to live, stage by stage; peak memory of daemon, worker and client; bytes on disk per version.

    python -m benchmarks.stages [--model bundled|ViT-B-16] [--drop DIR] [--steps N] [--pause S] [--cold]
                                [--quick]

A fresh home, a daemon process, a client process that classifies all the while, one submission. The clock
starts where `submit` is called and stops when `current` leads to the version. Copying the images is part of
it, the command's own start is not; what is submitted is complete, so no settling is waited for. What is
tidied up before the daemon records the version is told apart, as *live to recorded*. *Training* is the
worker's stage of that name: making the views of the images, what the old model says of them, the gradient
steps, their checkpoints. Decoding, scoring, folding are not in it. So few --steps do as well as many for all
else; 0 takes the preset's.

Over random features a batch may learn too little and be held. Then it is promoted, as an operator would who
looks at it first: once a worker stands by again. All of `dynlora promote` counts on top: it folds, verifies
and examines once more.

The client asks again --pause seconds after each answer; with a large model and hardly a pause it keeps one
core busy. With --cold no worker stands by. Nothing else should run on the machine: absolute times depend on
it. A quick run takes four steps and writes no results.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks import models, reporting
from benchmarks.program import dynlora
from benchmarks.waiting import Companion, wait_for
from daemon.home import create_home
from daemon.submit import submit

CLIENT = """
import sys, time
from deploy.client import Client
seen = []
with Client(sys.argv[1], threads=1) as client:
    while True:
        [answer] = client.classify([sys.argv[2]], labels=["shoe", "hat"])
        if answer.version not in seen:
            seen.append(answer.version)
            print(answer.version, time.time(), flush=True)
        time.sleep(float(sys.argv[3]))
"""
GOAL_SECONDS = {"bundled": 0.7, "ViT-B-16": 6.0}
PAUSE_SECONDS = 0.02
LONGEST_SECONDS = 3600.0  # of one batch; what takes longer, as an hour of training, is not measured here
START_SECONDS = 120.0
TROUBLE = ("attempt_failed", "failed", "discarded", "duplicate")  # events after which no version comes
_TICKS = os.sysconf("SC_CLK_TCK")

Event = dict[str, Any]


@dataclass(frozen=True)
class Moments:
    """When what no event tells happened: the drop, the order to promote, and the switch of `current`."""

    dropped: float
    ordered: float
    live: float


class Home:
    """A home with its daemon and a client that keeps asking."""

    def __init__(self, home: Path, image: Path, *, pause_seconds: float) -> None:
        self.path = home
        command = (sys.executable, "-m", "daemon.cli", "--home", str(home), "run")
        self.daemon = Companion("daemon", command, home / "daemon.txt")
        arguments = (str(home / "serving"), str(image), str(pause_seconds))
        self.client = Companion("client", (sys.executable, "-c", CLIENT, *arguments), home / "client.txt")

    def close(self) -> None:
        """End both."""
        self.client.process.kill()
        self.daemon.process.send_signal(signal.SIGTERM)
        self.daemon.process.wait(60)

    def wait_for_event(self, *names: str, seconds: float = LONGEST_SECONDS) -> Event:
        """The first event of one of these names.

        Raises:
            RuntimeError: none comes: the batch failed, the daemon or the client ended, or it takes too long.
        """
        what = f"event {' or '.join(names)}"
        return wait_for(
            lambda: told_event(self.path, names), what, (self.daemon, self.client), seconds=seconds
        )

    def wait_for_answer(self, version: int) -> float:
        """When the client had its first answer of a version, by the clock."""

        def look() -> float | None:
            answers = (line.split() for line in self.client.lines())
            return next((float(at) for number, at in answers if int(number) >= version), None)

        return wait_for(look, f"answer of version {version}", (self.client,), seconds=START_SECONDS)

    def wait_for_standby(self) -> None:
        """Wait until the daemon's child has imported everything: it takes no processor time any more."""
        before = -1.0

        def look() -> bool | None:
            nonlocal before
            now, was = self._busy_seconds(), before
            before = now
            time.sleep(1)
            return True if 0 < now == was else None

        wait_for(look, "worker standing by", (self.daemon,), seconds=START_SECONDS)

    def _busy_seconds(self) -> float:
        """Processor time of the daemon's children."""
        pid = self.daemon.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        fields = [Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split() for child in children]
        return sum(int(field[11]) + int(field[12]) for field in fields) / _TICKS


def events(home: Path) -> list[Event]:
    """What the daemon has told so far, with `time` in seconds of the clock."""
    path = home / "events.jsonl"
    lines = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    told = [json.loads(line) for line in lines]
    return [event | {"time": datetime.fromisoformat(event["at"]).timestamp()} for event in told]


def told_event(home: Path, names: Sequence[str]) -> Event | None:
    """The first event of one of these names, if it was told.

    Raises:
        RuntimeError: another one was told, after which it will not come.
    """
    for event in events(home):
        if event["event"] in names:
            return event
        if event["event"] in TROUBLE:
            raise RuntimeError(f"the batch was not published but {event['event']}: {event.get('why')}")
    return None


def peak_bytes(pid: int) -> int:
    """Largest resident size so far, from the kernel."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def measure(path: Path, drop: Path, *, is_cold: bool, pause_seconds: float) -> dict[str, Any]:
    """Figures of one batch.

    Raises:
        RuntimeError: it came to nothing; says why.
    """
    home = Home(path, min(drop.rglob("*.jpg")), pause_seconds=pause_seconds)
    try:
        home.wait_for_answer(0)
        home.wait_for_event("started", seconds=START_SECONDS)
        if not is_cold:
            home.wait_for_standby()
        dropped = time.time()
        submit(drop, path / "inbox")
        recorded = decided = home.wait_for_event("published", "held")
        if decided["event"] == "held" and not is_cold:
            home.wait_for_standby()
        ordered = time.time()
        if decided["event"] == "held":
            dynlora(path, "promote", decided["batch"], "--why", "a benchmark")
            recorded = home.wait_for_event("promoted", seconds=START_SECONDS)
        moments = Moments(dropped, ordered, (path / "serving" / "current").lstat().st_ctime)
        seen = home.wait_for_answer(recorded["version"])
        memory = {
            name: peak_bytes(companion.process.pid)
            for name, companion in (("daemon", home.daemon), ("client", home.client))
        }
    finally:
        home.close()
    version_dir = path / "serving" / "versions" / str(recorded["version"])
    sizes = {file.name: file.stat().st_size for file in sorted(version_dir.iterdir())}
    memory["worker"] = read_report(path)["peak_memory_bytes"]
    seconds = stage_seconds(path, decided, recorded, moments) | {"live to first answer": seen - moments.live}
    return {
        "seconds": seconds,
        "outcome": decided["event"],
        "peak_memory_bytes": memory,
        "version_bytes": sizes,
    }


def stage_seconds(home: Path, decided: Event, recorded: Event, moments: Moments) -> dict[str, float]:
    """Put together what the events and the worker's report say.

    Args:
        decided: the event that ended learning, published or held.
        recorded: the event of the version; the same one, unless the batch was promoted.
    """
    told = {event["event"]: event["time"] for event in events(home)}
    worked = read_report(home)["seconds"]
    is_held = recorded is not decided
    done = decided["time"] if is_held else moments.live
    rest = done - moments.dropped - worked["train"]
    promotion = moments.live - moments.ordered if is_held else 0.0
    around = done - told["adapting"] - sum(worked.values())
    return {
        "drop to queued": told["queued"] - moments.dropped,
        "queued to adapting": told["adapting"] - told["queued"],
        **{f"worker: {stage}": seconds for stage, seconds in worked.items()},
        f"worker start and {'holding' if is_held else 'publishing'}": around,
        **({"drop to held minus training": rest, "promotion": promotion} if is_held else {}),
        "drop to live minus training": rest + promotion,
        "live to recorded": recorded["time"] - moments.live,
    }


def read_report(home: Path) -> dict[str, Any]:
    """What the worker said of the one batch that was learnt."""
    [path] = home.glob("spool/done/*/result/report.json")
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def describe(result: dict[str, Any]) -> str:
    """Markdown of one measurement."""
    rows = [[stage, f"{value:.2f} s"] for stage, value in result["seconds"].items()]
    rows += [
        [f"peak memory of the {process}", f"{size / 1e6:.0f} MB"]
        for process, size in result["peak_memory_bytes"].items()
    ]
    rows += [[name, f"{size / 1e6:.2f} MB"] for name, size in result["version_bytes"].items()]
    rows.append(["one version on disk", f"{sum(result['version_bytes'].values()) / 1e6:.2f} MB"])
    return "\n\n".join([_introduction(result), reporting.table(["stage", "figure"], rows)])


def _introduction(result: dict[str, Any]) -> str:
    model, rest = result["model"], result["seconds"]["drop to live minus training"]
    goal = GOAL_SECONDS.get(model)
    judged = f": {reporting.verdict(rest, goal=goal)}" if goal else ""
    how = "no worker standing by" if result["is_cold"] else "a worker standing by"
    promoted = " The batch was held and then promoted." if result["outcome"] == "held" else ""
    return (
        f"{model}, {result['images']} images, {how}, a client that asks again after "
        f"{result['pause_seconds']:g} s.{promoted} Minus training {rest:.2f} s{judged}."
    )


def main() -> None:
    """Run, print, and write results/stages-<model>.json and .md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--drop", type=Path, default=Path("examples/demo/images/drop/clothing"))
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--pause", type=float, default=PAUSE_SECONDS)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    where, steps = reporting.machine(), 4 if options.quick else options.steps
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch, "home")
        create_home(home)
        models.found(home, options.model)
        # A few steps, or random weights, teach little: the gate is not what is measured here.
        (home / "config.toml").write_text(
            f"[learning]\nsteps = {steps}\nstandby = {str(not options.cold).lower()}\n"
            "[exam]\nmin_gain = 0.0\nalpha = 1e-9\n"
        )
        result = measure(home, options.drop, is_cold=options.cold, pause_seconds=options.pause)
    result |= {"model": options.model, "is_cold": options.cold, "steps": steps, "machine": where}
    result |= {"images": sum(1 for _ in options.drop.rglob("*.jpg")), "pause_seconds": options.pause}
    if options.quick:
        print(describe(result))
    else:
        reporting.save(f"stages-{options.model}{'-cold' if options.cold else ''}", result, describe(result))


if __name__ == "__main__":
    main()
