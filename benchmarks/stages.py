"""From drop to live, stage by stage; peak memory of daemon, worker and client; bytes on disk per version.

    python -m benchmarks.stages [--drop examples/demo/images/drop/clothing] [--model bundled]

A fresh home, a daemon process, a client process that classifies all the while, one `dynlora submit`. Nothing
else should run on the machine: absolute times depend on it, the shares much less.
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


def program(*arguments: str, home: Path) -> str:
    """Run one command of dynlora and return what it prints."""
    command = [sys.executable, "-m", "daemon.cli", "--home", str(home), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def peak_bytes(pid: int) -> int:
    """Largest resident size so far, from the kernel."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def measure(home: Path, drop: Path) -> dict:
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
        dropped = time.time()
        program("submit", str(drop), "--wait", home=home)
        version, seen = client.stdout.readline().split()
        memory = {"daemon": peak_bytes(daemon.pid), "client": peak_bytes(client.pid)}
    finally:
        client.kill()
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(60)
    return figures(home, int(version), dropped, float(seen), memory)


def figures(home: Path, version: int, dropped: float, seen: float, memory: dict[str, int]) -> dict:
    """Put together what the events, the report and the disk say."""
    [report_path] = home.glob("spool/done/*/result/report.json")
    report = json.loads(report_path.read_text())
    events = [json.loads(line) for line in (home / "events.jsonl").read_text().splitlines()]
    moments = {event["event"]: datetime.fromisoformat(event["at"]).timestamp() for event in events}
    learning = sum(report["seconds"].values())
    live = moments["published"] - dropped
    version_dir = home / "serving" / "versions" / str(version)
    return {
        "seconds": {
            "drop to queued": moments["queued"] - dropped,
            "worker start and publishing": moments["published"] - moments["adapting"] - learning,
            **{f"worker: {stage}": seconds for stage, seconds in report["seconds"].items()},
            "drop to live": live,
            "drop to live minus training": live - report["seconds"]["train"],
            "live to first answer": seen - moments["published"],
        },
        "peak_memory_bytes": memory | {"worker": report["peak_memory_bytes"]},
        "version_bytes": {path.name: path.stat().st_size for path in sorted(version_dir.iterdir())},
    }


def main() -> None:
    """Run, print, and write results/stages.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--drop", type=Path, default=Path("examples/demo/images/drop/clothing"))
    parser.add_argument("--model", default="bundled")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch, "home")
        program("init", "--model", options.model, home=home)
        result = measure(home, options.drop)
    images = sum(1 for _ in options.drop.rglob("*.jpg"))
    print(f"{options.model}, {images} images, {os.cpu_count()} cores")
    for stage, seconds in result["seconds"].items():
        print(f"  {stage:30s} {seconds:8.2f} s")
    for process, size in result["peak_memory_bytes"].items():
        print(f"  peak memory of the {process:11s} {size / 1e6:8.0f} MB")
    for name, size in result["version_bytes"].items():
        print(f"  {name:30s} {size / 1e6:8.2f} MB")
    total = sum(result["version_bytes"].values())
    print(f"  {'one version on disk':30s} {total / 1e6:8.2f} MB")
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "stages.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
