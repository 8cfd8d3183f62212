"""Many small batches through one daemon, and what its process and its home have come to."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

from daemon.budget import used_bytes
from daemon.spool import Spool
from tests.daemon.drops import draw_batch

PATIENCE_SECONDS = 120  # for one batch, on a machine that does other things too


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a process holds."""

    resident_bytes: int
    descriptors: int
    threads: int


def footprint(pid: int) -> Footprint:
    """As the kernel counts it."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Footprint(int(lines["RssAnon"].split()[0]) * 1024, descriptors, int(lines["Threads"]))


def drop(home: Path, number: int) -> None:
    """One batch of one class, complete."""
    draft = draw_batch(
        home.parent / f"batch-{number}", f"class {number}", seed=number, size=24, suffix=".png"
    )
    shutil.move(draft, home / "inbox" / draft.name)


def wait_for_done(process, home: Path, count: int) -> None:
    """Wait until so many batches are in done/; each may take its time, and a daemon that ended is told."""
    spool, done = Spool(home), -1
    while done < count:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(spool.ids("done")) == done:
            assert process.poll() is None, process.returncode
            assert time.monotonic() < deadline, (home / "status.json").read_text()
            time.sleep(0.1)
        done = len(spool.ids("done"))
        assert spool.ids("failed") == []


def wait_for_rest(pid: int, home: Path, children: int) -> None:
    """Wait until nothing is under way and so many workers stand by: pipes to a worker are no leak."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        found = len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        if json.loads((home / "status.json").read_text())["state"] == "idle" and found == children:
            return
        assert time.monotonic() < deadline, (found, (home / "status.json").read_text())
        time.sleep(0.1)


def live(process, home: Path, *, warm: int, count: int, standing_by: int) -> tuple[Footprint, Footprint]:
    """Drop and await `count` batches; the daemon's footprint after the first `warm` ones, and after all.

    Batches come ten at a time, as from a producer that looks at the queue.

    Args:
        standing_by: how many workers wait for the next batch while there is none.
    """
    before = None
    for number in range(1, count + 1):
        drop(home, number)
        if number % 10 == 0 or number in (warm, count):
            wait_for_done(process, home, number)
        if number in (warm, count):
            wait_for_rest(process.pid, home, standing_by)
        if number == warm:
            before = footprint(process.pid)
    assert before is not None
    return before, footprint(process.pid)


def sizes(home: Path) -> dict[str, int]:
    """Bytes on the disk by folder of the home."""
    return {path.name: used_bytes(path) for path in sorted(home.iterdir()) if path.is_dir()}


def tell(before: Footprint, after: Footprint, home: Path, seconds: float) -> None:
    """For whoever reads the test's output."""
    grown = (after.resident_bytes - before.resident_bytes) / 1e6
    print(json.dumps({"before": dataclasses.asdict(before), "after": dataclasses.asdict(after)}))
    print(json.dumps({"grown_mb": round(grown, 2), "seconds": round(seconds), "disk": sizes(home)}))
