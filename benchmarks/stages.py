"""From drop to live, stage by stage; peak memory of daemon, worker and client; bytes on disk per version.

    python -m benchmarks.stages [--model bundled|ViT-B-16] [--drop DIR] [--steps N] [--cold] [--quick]

A fresh home, a daemon process, a client process that classifies all the while, one submission. The clock
starts where `submit` is called (copying the images is part of it, the command's own start is not) and stops
when the daemon has recorded the version as published. *Training* is the worker's stage of that name: making
the views of the images, what the old model says of them, the gradient steps, their checkpoints. Decoding,
scoring, folding are not in it. So few --steps do as well as many for all else; 0 takes the preset's. With
--cold no worker stands by. Nothing else should run on the machine: absolute times depend on it. A quick run
takes four steps and writes no results.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks import models, reporting
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
        time.sleep(0.02)
"""
GOAL_SECONDS = {"bundled": 0.7, "ViT-B-16": 6.0}
_TICKS = os.sysconf("SC_CLK_TCK")


def peak_bytes(pid: int) -> int:
    """Largest resident size so far, from the kernel."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def wait_until_ready(daemon: int) -> None:
    """Wait until the daemon's child has imported everything: until it takes no processor time any more."""

    def busy_seconds() -> float:
        children = Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split()
        fields = [Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split() for child in children]
        return sum(int(field[11]) + int(field[12]) for field in fields) / _TICKS

    before, deadline = -1.0, time.monotonic() + 120
    while (now := busy_seconds()) == 0 or now != before:
        if time.monotonic() > deadline:
            raise TimeoutError("no worker stands by after two minutes")
        before = now
        time.sleep(1)


def measure(home: Path, drop: Path, *, is_cold: bool) -> dict[str, Any]:
    """Figures of one batch."""
    image = str(next(path for path in sorted(drop.rglob("*.jpg"))))
    daemon = subprocess.Popen(
        [sys.executable, "-m", "daemon.cli", "--home", str(home), "run"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(home / "serving"), image], stdout=subprocess.PIPE, text=True
    )
    try:
        assert client.stdout is not None
        client.stdout.readline()  # version 0 answers
        wait_for_event(home, "started")
        if not is_cold:
            wait_until_ready(daemon.pid)
        dropped = time.time()
        submit(drop, home / "inbox")
        wait_for_event(home, "published")
        version, seen = client.stdout.readline().split()
        memory = {"daemon": peak_bytes(daemon.pid), "client": peak_bytes(client.pid)}
    finally:
        client.kill()
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(60)
    return figures(home, int(version), dropped, float(seen), memory)


def wait_for_event(home: Path, name: str) -> None:
    """Wait until the daemon has recorded it.

    Raises:
        RuntimeError: the batch ended in another way.
    """
    while True:
        events = moments(home)
        if name in events:
            return
        if found := events.keys() & {"failed", "held"}:
            raise RuntimeError(f"the batch was not published but {found.pop()}")
        time.sleep(0.05)


def moments(home: Path) -> dict[str, float]:
    """When each event happened, in seconds of the clock."""
    path = home / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    events = [json.loads(line) for line in lines]
    return {event["event"]: datetime.fromisoformat(event["at"]).timestamp() for event in events}


def figures(home: Path, version: int, dropped: float, seen: float, memory: dict[str, int]) -> dict[str, Any]:
    """Put together what the events, the report and the disk say."""
    [report_path] = home.glob("spool/done/*/result/report.json")
    report, events = json.loads(report_path.read_text()), moments(home)
    at_work = sum(report["seconds"].values())
    live = events["published"] - dropped
    version_dir = home / "serving" / "versions" / str(version)
    return {
        "seconds": {
            "drop to queued": events["queued"] - dropped,
            "queued to adapting": events["adapting"] - events["queued"],
            "worker start and publishing": events["published"] - events["adapting"] - at_work,
            **{f"worker: {stage}": seconds for stage, seconds in report["seconds"].items()},
            "drop to live": live,
            "drop to live minus training": live - report["seconds"]["train"],
            "live to first answer": seen - events["published"],
        },
        "peak_memory_bytes": memory | {"worker": report["peak_memory_bytes"]},
        "version_bytes": {path.name: path.stat().st_size for path in sorted(version_dir.iterdir())},
    }


def describe(model: str, result: dict[str, Any], images: int) -> str:
    """Markdown of one measurement."""
    seconds = result["seconds"]
    rest = seconds["drop to live minus training"]
    goal = GOAL_SECONDS.get(model)
    rows = [[stage, f"{value:.2f} s"] for stage, value in seconds.items()]
    rows += [
        [f"peak memory of the {process}", f"{size / 1e6:.0f} MB"]
        for process, size in result["peak_memory_bytes"].items()
    ]
    rows += [[name, f"{size / 1e6:.2f} MB"] for name, size in result["version_bytes"].items()]
    rows.append(["one version on disk", f"{sum(result['version_bytes'].values()) / 1e6:.2f} MB"])
    judged = f": {reporting.verdict(rest, goal=goal)}" if goal else ""
    how = "no worker standing by" if result["is_cold"] else "a worker standing by"
    return f"{model}, {images} images, {how}. Minus training {rest:.2f} s{judged}.\n\n" + reporting.table(
        ["stage", "figure"], rows
    )


def main() -> None:
    """Run, print, and write results/stages-<model>.json and .md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--drop", type=Path, default=Path("examples/demo/images/drop/clothing"))
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    where, steps = reporting.machine(), 4 if options.quick else options.steps
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch, "home")
        create_home(home)
        models.found(home, options.model)
        # A few steps, or random weights, teach nothing: the gate is not what is measured here.
        (home / "config.toml").write_text(
            f"[learning]\nsteps = {steps}\nstandby = {str(not options.cold).lower()}\n"
            "[exam]\nmin_gain = 0.0\nalpha = 1e-9\n"
        )
        result = measure(home, options.drop, is_cold=options.cold)
    result |= {"model": options.model, "is_cold": options.cold, "steps": steps, "machine": where}
    text = describe(options.model, result, sum(1 for _ in options.drop.rglob("*.jpg")))
    if options.quick:
        print(text)
    else:
        reporting.save(f"stages-{options.model}{'-cold' if options.cold else ''}", result, text)


if __name__ == "__main__":
    main()
