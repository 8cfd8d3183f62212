"""What a drop costs when there are many: dropped at once, or after a long life.

    python -m benchmarks.inbox [drops] [age] [huge] [--counts 125 250 500 1000] [--files 100000] [--quick]

    drops   so many tiny batches lie in the inbox at the same moment; all of them are to be queued
    age     so many batches are done already; one more is taken in, and the daemon is started and looked at
    huge    one drop of so many files; meanwhile a daemon is asked things, and gets small drops

Nothing is learnt (the home is paused), and no torch is loaded. Goals: one of the most drops at once takes no
more than 1.3 times the CPU of one of the fewest; one into a home with the most done batches no more than 1.3
times that of one into the home with the fewest. BENCH_DIR says where the homes are made.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.reporting import machine, save, table, verdict
from daemon.batch import Batch, BatchClass, BatchImage, content_sha256
from daemon.config import Config, InboxConfig
from daemon.events import EventLog
from daemon.home import create_home
from daemon.lifecycle import Launch
from daemon.progress import LineView
from daemon.requests import Answer, Request, run_or_request
from daemon.rest import Pause, write_pause
from daemon.service import Service
from daemon.spool import Spool
from daemon.status import read_status, snapshot
from tests.daemon.drops import draw_batch
from tests.deploy.tiny import found_tiny

GOAL = 1.3
ON = os.environ.get("BENCH_DIR")  # /dev/shm: without the time that the disk takes to flush
_CONFIG = Config(inbox=InboxConfig(settle_seconds=0, gather_seconds=0, scan_seconds=1))


def new_home(folder: Path) -> Path:
    """A paused home with a tiny version 0."""
    create_home(folder)
    found_tiny(folder / "serving")
    write_pause(folder, Pause(who="benchmark"))
    return folder


def drop(home: Path, number: int) -> None:
    """One small batch folder that says it is complete."""
    folder = home / "inbox" / f"drop-{number:06d}"
    draw_batch(folder, f"class {number % 50}", seed=number, size=8, suffix=".jpg")


def start(home: Path) -> Service:
    """A daemon on the home, after its recovery."""
    service = Service(home, _CONFIG, view=LineView(), launch=Launch(make_command=lambda *args: list(args)))
    service.start()
    return service


def queue_all(home: Path, count: int, *, limit_seconds: float = 500.0) -> dict[str, Any]:
    """Let the daemon take in `count` drops; how long that took, and the longest round of its loop."""
    service, spool, longest = start(home), Spool(home), 0.0
    begun, cpu = time.time(), time.process_time()
    while len(spool.ids("queued")) < count and time.time() - begun < limit_seconds:
        before = time.perf_counter()
        service.reception.wake.set()
        service.tick(time.time())
        longest = max(longest, time.perf_counter() - before)
    service.stop()
    seconds, cpu = time.time() - begun, time.process_time() - cpu
    queued = len(spool.ids("queued"))
    return {"seconds": seconds, "queued": queued, "cpu_seconds": cpu, "longest_round": longest}


def measure_drops(counts: list[int]) -> dict[str, Any]:
    """What so many drops at once take until all are queued, for each number of them."""
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory(dir=ON) as folder:
            home = new_home(Path(folder) / "home")
            for number in range(count):
                drop(home, number)
            found = queue_all(home, count)
        rows.append({"count": count, **found})
        print(rows[-1], flush=True)
    return {"rows": rows}


def measure_age(ages: list[int]) -> dict[str, Any]:
    """Milliseconds of what a daemon and its commands do, in homes with so many done batches."""
    rows = []
    for age in ages:
        with tempfile.TemporaryDirectory(dir=ON) as folder:
            home = new_home(Path(folder) / "home")
            for number in range(1, age + 1):
                _write_done(home, number)
            seconds, service = _timed(lambda home=home: start(home))
            row = {"age": age, "start": seconds, "status": _timed(lambda home=home: snapshot(home))[0]}
            service.tick(time.time())
            ticks = [_timed(lambda service=service: service.tick(time.time()))[0] for _ in range(20)]
            row["round"] = float(np.median(ticks))
            took = []
            for number in range(age + 1, age + 12):
                drop(home, number)
                service.reception.wake.set()
                cpu = time.process_time()
                took.append((_timed(lambda s=service: s.tick(time.time()))[0], time.process_time() - cpu))
            row |= {"first_drop": took[0][0]}
            row |= dict(zip(("drop", "drop_cpu"), map(float, np.median(took[1:], axis=0)), strict=True))
            service.stop()
        rows.append({key: value if key == "age" else 1000 * value for key, value in row.items()})
        print(rows[-1], flush=True)
    return {"rows": rows}


def _write_done(home: Path, number: int) -> None:
    """A batch as it lies in done/ when its images have been deleted, and its events."""
    batch_id, key = f"{number:06d}-class-{number % 50}", f"class {number % 50}"
    hashes = [f"{number:032x}{index:032x}" for index in range(10)]
    images = [
        BatchImage(
            file=f"images/{sha256[:24]}.jpg", origin=f"source/x/{index}.jpg", class_key=key, sha256=sha256,
            width=8, height=8, split="exam" if index < 2 else "train",
        )
        for index, sha256 in enumerate(hashes)
    ]  # fmt: skip
    record = Batch(
        id=batch_id, seq=number, slug=key, kind="batch", received_at="2026-11-01T00:00:00+00:00",
        images=images,
        classes=[BatchClass(name=key, key=key, template="a {}", folder=key, is_new=False)],
        content_sha256=content_sha256((key, sha256) for sha256 in hashes),
    )  # fmt: skip
    folder = home / "spool" / "done" / batch_id
    folder.mkdir()
    (folder / "batch.json").write_text(record.to_json())
    log = EventLog(home)
    for event in ("queued", "adapting", "published"):
        log.append(event, batch=batch_id, version=number)


def measure_huge(files: int) -> dict[str, Any]:
    """Seconds until a drop of so many files is queued, and how long others wait meanwhile."""
    with tempfile.TemporaryDirectory(dir=ON) as folder:
        home = new_home(Path(folder) / "home")
        (home / "config.toml").write_text(
            "[inbox]\nsettle_seconds = 0\ngather_seconds = 0\nscan_seconds = 1\n"
        )
        made = Path(folder) / "huge" / "many things"
        made.mkdir(parents=True)
        rng = np.random.default_rng(7)
        for number, pixels in enumerate(rng.integers(0, 255, (files, 8, 8, 3), dtype=np.uint8)):
            Image.fromarray(pixels).save(made / f"{number:06d}.jpg")
        (made.parent / ".ready").touch()
        command = [sys.executable, "-m", "daemon.cli", "--home", str(home), "run"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as daemon:
            while not read_status(home):
                time.sleep(0.05)
            made.parent.rename(home / "inbox" / "huge")
            try:
                return {"files": files, **_wait_for_huge(home, daemon.pid)}
            finally:
                daemon.terminate()


def _wait_for_huge(home: Path, pid: int) -> dict[str, Any]:
    spool, begun, phases = Spool(home), time.perf_counter(), dict[str, float]()
    answered: list[float] = []
    queued: list[float] = []
    peaks = {"daemon": 0.0, "child": 0.0}
    while not any(batch.endswith("-huge") for batch in spool.ids("queued")):
        request = Request(command="pause", who="benchmark")
        answered.append(_timed(lambda r=request: run_or_request(home, r, lambda _: Answer(exit_code=1)))[0])
        number = len(queued)
        drop(home, number)
        before = time.perf_counter()
        while not any(batch.endswith(f"drop-{number:06d}") for batch in spool.ids("queued")):
            at_hand = read_status(home).get("taking_in") or {}
            phases[at_hand.get("phase", "before")] = time.perf_counter() - begun
            for name, of in (("daemon", pid), ("child", _child_of(pid))):
                peaks[name] = max(peaks[name], _peak_mb(of))
            time.sleep(0.01)
        queued.append(time.perf_counter() - before)
    return {
        "seconds": time.perf_counter() - begun,
        "answers": len(answered),
        "answer_median": float(np.median(answered)), "answer_longest": max(answered),
        "small_drops": len(queued), "small_median": float(np.median(queued)),
        "small_longest": max(queued), "phases_until": phases, "peak_mb": peaks,
    }  # fmt: skip


def _child_of(pid: int) -> int | None:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(found[0]) if found else None


def _peak_mb(pid: int | None) -> float:
    """The most memory a process has had, in MB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM")), 0.0)


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def report(result: dict[str, Any]) -> str:
    """Tables, and whether the goals were met."""
    parts = []
    if "drops" in result:
        rows = result["drops"]["rows"]
        parts.append(
            table(
                ["at once", "queued after", "per drop", "CPU per drop", "longest round"],
                [
                    [r["count"], f"{r['seconds']:.1f} s", f"{1000 * r['seconds'] / r['queued']:.1f} ms",
                     f"{1000 * r['cpu_seconds'] / r['queued']:.1f} ms", f"{r['longest_round']:.2f} s"]
                    for r in rows
                ],
            )
        )  # fmt: skip
        each = [row["cpu_seconds"] / row["queued"] for row in rows]
        parts.append(f"CPU of a drop, most at once / fewest: {verdict(each[-1] / each[0], goal=GOAL)}")
    if "age" in result:
        rows = result["age"]["rows"]
        names = ("start", "status", "round", "first_drop", "drop", "drop_cpu")
        header = ["done batches", "start, ms", "status", "idle round", "first drop", "drop", "CPU of a drop"]
        parts.append(table(header, [[r["age"], *(f"{r[name]:.1f}" for name in names)] for r in rows]))
        each = [row["drop_cpu"] for row in rows]
        parts.append(f"CPU of a drop, oldest home / youngest: {verdict(each[-1] / each[0], goal=GOAL)}")
    if "huge" in result:
        found = result["huge"]
        rows = [
            ["queued after", f"{found['seconds']:.0f} s"],
            ["a request was answered after, median and longest",
             f"{found['answer_median']:.2f} s, {found['answer_longest']:.2f} s of {found['answers']}"],
            ["a small drop was queued after, median and longest",
             f"{found['small_median']:.2f} s, {found['small_longest']:.2f} s of {found['small_drops']}"],
            ["most memory, daemon", f"{found['peak_mb']['daemon']:.0f} MB"],
            ["most memory, the drop's process", f"{found['peak_mb']['child']:.0f} MB"],
            ["phases ended after", ", ".join(f"{k} {v:.0f} s" for k, v in found["phases_until"].items())],
        ]  # fmt: skip
        parts.append(table([f"one drop of {found['files']:,} files", ""], rows))
    return "\n\n".join(parts)


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=[], help="drops, age, huge; all by default")
    parser.add_argument("--counts", type=int, nargs="+", default=[125, 250, 500, 1000])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true", help="few drops, nothing saved")
    options = parser.parse_args()
    counts = [20, 40] if options.quick else options.counts
    files = 2000 if options.quick else options.files
    measures: dict[str, Callable[[], Any]] = {
        "drops": lambda: measure_drops(counts),
        "age": lambda: measure_age(counts),
        "huge": lambda: measure_huge(files),
    }
    result: dict[str, Any] = {"machine": machine()}
    result |= {name: measures[name]() for name in options.parts or measures}
    if options.quick:
        print(report(result))
    else:
        save("inbox", result, report(result))


if __name__ == "__main__":
    main()
