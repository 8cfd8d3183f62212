"""Callers in closed loops against a client whose versions are swapped under them.

    python -m benchmarks.swap [--swaps 100] [--model bundled|ViT-B-16] [--callers N] [--seconds S] [--quick]

The client, its loading and the callers are one process, as in a program that serves; one more process
publishes new versions, with other weights each, into a real store. With two cores or more the publisher has
the last one and the serving process the others (with two cores: one), so loading and warming compete with
the requests for the same cores; ONNX Runtime has one thread per caller. Every answer's embedding is
compared with that of the version it names.

*steady*  requests while nothing is loaded; *loading*: those that overlap the loading and warming of a version
*first*   the request that began first among those that a version answered; for comparison, the request
          that began first after any moment of steady time
*growth*  of resident memory between two swaps, from the second fifth to the last, reckoned for 200 swaps

The negative control is a client that keeps its old versions: it must fail the same check; to be done sooner,
it has two callers. Loading a large model beside callers that are never idle takes minutes: no swap begins
after --seconds, and the result says how many there were. A quick run swaps six times and writes no results.
"""

import argparse
import contextlib
import ctypes
import multiprocessing as mp
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, reporting
from deploy.client import Client, ClientEvent
from deploy.opening import open_session
from deploy.store import VersionStore

PICTURES = 4
TOLERANCE = 1e-4  # |difference| of an embedding's element; versions differ by a hundred times as much
CALLERS = {
    "bundled": 8,
    "ViT-B-16": 2,
}  # beside 8 of them, loading a ViT-B/16 on their core takes two minutes
GROWTH_BYTES = 100e6
GROWTH_SWAPS = 200
MOMENT_SECONDS = 0.05
CONTROL_SWAPS, CONTROL_CALLERS = 10, 2
KEEP_FULL, LEAST_SWAPS = 3, 3
SECONDS = {"bundled": 420.0, "ViT-B-16": 240.0}  # so that all of it takes less than ten minutes
CONTROL_SHARE = 0.25  # of the time, on top


class LeakingClient(Client):
    """The negative control: never lets go of a version that it has left."""

    def _release_retired(self) -> None:
        """Keep them all."""


@dataclass
class Caller:
    """One thread that asks again as soon as it has its answer."""

    requests: list[tuple[float, float, int]] = field(default_factory=list)  # start, seconds, version
    failed: list[str] = field(default_factory=list)
    mixed: int = 0

    @property
    def asked(self) -> int:
        """How many requests have ended, well or not."""
        return len(self.requests) + len(self.failed)

    def run(self, client: Client, expected: "Expected", picture: int, stop: threading.Event) -> None:
        """Ask for the embedding of one picture until told to stop."""
        pixels = expected.pixels[picture : picture + 1]
        while not stop.is_set():
            started = time.perf_counter()
            try:
                with client.hold() as loaded:
                    version, embedding = loaded.version, loaded.encode_pixels(pixels)[0]
            except Exception as error:  # noqa: BLE001 - counting what fails is the point
                self.failed.append(repr(error))
                continue
            self.requests.append((started, time.perf_counter() - started, version))
            if not np.abs(embedding - expected.of(version)[picture]).max() <= TOLERANCE:
                self.mixed += 1


class Expected:
    """What each version answers to each picture, as the publisher found before it published it."""

    def __init__(self, folder: Path, pixels: np.ndarray) -> None:
        self.pixels, self._folder = pixels, folder
        self._known: dict[int, np.ndarray] = {}

    def note(self, version_dir: Path, version: int) -> None:
        """Ask a version that lies in a directory, and leave its answers for the other process."""
        session = open_session(version_dir / "vision_model.onnx", 1)
        answers = [session.run(None, {"pixel_values": self.pixels[i : i + 1]})[0] for i in range(PICTURES)]
        np.save(self._folder / f"{version}.npy", np.concatenate(answers))

    def of(self, version: int) -> np.ndarray:
        """(pictures, dim) of one version."""
        if version not in self._known:
            self._known[version] = np.load(self._folder / f"{version}.npy")
        return self._known[version]


def publish_on_demand(
    home: Path, folder: Path, pixels: np.ndarray, orders: Connection, core: int | None
) -> None:
    """In a process of its own: publish a new version whenever told to, until the pipe is closed."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    store, expected = VersionStore(home / "serving"), Expected(folder, pixels)
    with contextlib.suppress(EOFError):
        while True:
            orders.recv()
            version = store.next_version()
            delta = models.random_delta(store, version, rank=2)
            staging, manifest = models.stage_update(store, delta, f"{version:06d}-random")
            expected.note(staging, version)
            store.publish(staging, manifest)
            store.prune(KEEP_FULL)
            orders.send(version)


@dataclass
class Measured:
    """What one run left."""

    callers: list[Caller]
    loads: list[tuple[float, float]]  # begin and end of loading, by time.perf_counter
    switches: list[float]  # seconds
    resident: list[int]  # bytes between two swaps


@dataclass(frozen=True)
class Amount:
    """How many swaps under how many callers; after so many seconds none begins beyond LEAST_SWAPS."""

    swaps: int
    callers: int
    seconds: float


def measure(kind: type[Client], store: VersionStore, pixels: np.ndarray, amount: Amount) -> Measured:
    """Swap versions under callers."""
    loads: list[tuple[float, float]] = []
    has_loaded = threading.Event()

    def on_event(event: ClientEvent) -> None:
        now = time.perf_counter()
        if event.kind == "loaded":
            loads.append((now - event.seconds, now))
            has_loaded.set()
        elif event.kind == "rejected":
            raise RuntimeError(event.detail)

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        expected = Expected(Path(folder), pixels)
        expected.note(store.path(store.current()), store.current())
        orders = stack.enter_context(publisher(store, Path(folder), pixels))
        client = stack.enter_context(kind(store.serving_dir, threads=1, poll_seconds=0.05, on_event=on_event))
        switches = time_switches(client)
        measured = Measured([Caller() for _ in range(amount.callers)], loads, switches, [])
        stop = threading.Event()
        threads = [
            threading.Thread(target=caller.run, args=(client, expected, index % PICTURES, stop))
            for index, caller in enumerate(measured.callers)
        ]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        for done in range(amount.swaps):
            seconds = time.monotonic() - began
            if seconds > amount.seconds and done >= LEAST_SWAPS:
                break
            if done % 10 == 0 or seconds > 10 * done:
                print(f"{kind.__name__}: {done} of {amount.swaps} swaps, {seconds:.0f} s", flush=True)
            has_loaded.clear()
            orders.send("publish")
            orders.recv()
            if not has_loaded.wait(300):
                raise RuntimeError(f"a version was not loaded in five minutes: {client.last_error}")
            client.refresh()  # what is no longer used is released here at the latest
            measured.resident.append(resident_bytes())
        done_before = [caller.asked for caller in measured.callers]
        while any(c.asked < n + 2 for c, n in zip(measured.callers, done_before, strict=True)):
            time.sleep(0.05)  # until the last version, too, has answered somebody's first request
        stop.set()
        for thread in threads:
            thread.join()
    return measured


@contextlib.contextmanager
def publisher(store: VersionStore, folder: Path, pixels: np.ndarray) -> Iterator[Connection]:
    """The publishing process, on the last core; ours is kept to the others."""
    cores = sorted(os.sched_getaffinity(0))
    ours, theirs = mp.Pipe()
    core = cores[-1] if len(cores) > 1 else None
    process = mp.get_context("spawn").Process(
        target=publish_on_demand, args=(store.serving_dir.parent, folder, pixels, theirs, core)
    )
    process.start()
    theirs.close()
    if core is not None:
        os.sched_setaffinity(0, set(cores[:-1]))
    try:
        yield ours
    finally:
        ours.close()
        process.join()
        os.sched_setaffinity(0, set(cores))


def time_switches(client: Client) -> list[float]:
    """Let every switch of the pointer be timed; returns the list that fills up, in seconds."""
    seconds: list[float] = []
    switch = client._switch  # noqa: SLF001 - the very step that is measured

    def timed(slot: Any) -> None:
        started = time.perf_counter()
        switch(slot)
        seconds.append(time.perf_counter() - started)

    client._switch = timed  # type: ignore[method-assign]  # noqa: SLF001
    return seconds


def resident_bytes() -> int:
    """What this process has in memory, after giving back what is only kept for later."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth_bytes(resident: list[int]) -> float:
    """Growth over GROWTH_SWAPS swaps, from the medians of the second fifth and of the last.

    Raises:
        RuntimeError: there were too few swaps to say.
    """
    if len(resident) < LEAST_SWAPS:
        raise RuntimeError(
            f"{len(resident)} swaps in the time: too few to say how memory grows; see --seconds"
        )
    fifth = max(1, len(resident) // 5)
    early, late = resident[fifth : 2 * fifth], resident[-fifth:]
    distance = len(resident) - 2 * fifth
    return float(np.median(late) - np.median(early)) / max(1, distance) * GROWTH_SWAPS


def figures(measured: Measured) -> dict[str, Any]:
    """The numbers that goals speak of; times in seconds."""
    requests = np.array([row for caller in measured.callers for row in caller.requests])
    starts, seconds, versions = requests.T
    begins, ends = np.array(measured.loads[1:]).T  # the first one had nobody to disturb
    is_loading = ((starts[:, None] < ends) & (starts[:, None] + seconds[:, None] > begins)).any(axis=1)
    steady, loading = seconds[~is_loading], seconds[is_loading]
    firsts = [
        seconds[rows][starts[rows].argmin()]
        for version in np.unique(versions)[1:]
        for rows in [np.flatnonzero(versions == version)]
    ]
    others = after_moments(starts, seconds, is_loading)
    return {
        "requests": len(seconds),
        "failed": sum(len(caller.failed) for caller in measured.callers),
        "mixed": sum(caller.mixed for caller in measured.callers),
        "swaps": len(measured.switches),
        "steady_median": float(np.median(steady)),
        "steady_p99": float(np.percentile(steady, 99)),
        "loading_p99": float(np.percentile(loading, 99)),
        "loading_requests": len(loading),
        "loading_p99_ratio": float(np.percentile(loading, 99) / np.percentile(steady, 99)),
        "first_median_ratio": float(np.median(firsts) / np.median(steady)),
        "moment_median_ratio": float(np.median(others) / np.median(steady)),
        "switch_max": max(measured.switches),
        "load_median": float(np.median(ends - begins)),
        "growth_bytes": growth_bytes(measured.resident),
        "resident_bytes": measured.resident,
    }


def after_moments(starts: np.ndarray, seconds: np.ndarray, is_loading: np.ndarray) -> np.ndarray:
    """How long the request took that began first after each of many moments at which nothing was loading."""
    order = starts.argsort()
    moments = np.arange(starts.min(), starts.max(), MOMENT_SECONDS)
    rows = order[starts[order].searchsorted(moments)]
    return seconds[rows[~is_loading[rows]]]


def describe(result: dict[str, Any]) -> str:
    """Markdown of one measurement."""
    judge = reporting.verdict
    growth, control = result["growth_bytes"] / 1e6, result["control_growth_bytes"] / 1e6
    limit = GROWTH_BYTES / 1e6
    steady = f"{result['steady_median'] * 1e3:.1f}, {result['steady_p99'] * 1e3:.1f} ms"
    loading = f"{result['loading_p99'] * 1e3:.1f} ms of {result['loading_requests']} requests"
    ratio, first = result["loading_p99_ratio"], result["first_median_ratio"]
    switch = result["switch_max"] * 1e3
    rows = [
        ["requests, swaps", f"{result['requests']}, {result['swaps']}", ""],
        ["failed", result["failed"], judge(result["failed"], goal=0)],
        ["mixed", result["mixed"], judge(result["mixed"], goal=0)],
        ["steady, median and p99", steady, ""],
        ["loading, p99", loading, ""],
        ["p99 loading / steady", f"{ratio:.2f}", judge(ratio, goal=1.5)],
        ["first / median, median of all swaps", f"{first:.2f}", judge(first, goal=1.2)],
        ["the same of a moment without a switch", f"{result['moment_median_ratio']:.2f}", ""],
        ["switch, longest", f"{switch:.3f} ms", judge(switch, goal=1)],
        ["loading and warming, median", f"{result['load_median']:.2f} s", ""],
        ["growth for 200 swaps", f"{growth:.0f} MB", judge(growth, goal=limit)],
        ["the same, leaking client", f"{control:.0f} MB",
         "fails the check, as it must" if control > limit else "PASSES, so the check says nothing"],
    ]  # fmt: skip
    who = f"{result['model']}, {result['callers']} callers, {CONTROL_CALLERS} of the leaking client"
    return f"{who}; {result['sharing']}.\n\n" + reporting.table(["what", "figure", "goal"], rows)


def main() -> None:
    """Run, print, and write results/swap-<model>.json and .md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--callers", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    where, cores = reporting.machine(), len(os.sched_getaffinity(0))
    swaps, control_swaps = (6, 5) if options.quick else (options.swaps, CONTROL_SWAPS)
    callers = options.callers or CALLERS.get(options.model, CALLERS["bundled"])
    seconds = options.seconds or SECONDS.get(options.model, max(SECONDS.values()))
    with tempfile.TemporaryDirectory() as scratch:
        store = models.found(Path(scratch, "home"), options.model)
        with np.load(store.path(0) / "reference.npz") as arrays:
            pixels = arrays["pixel_values"][:PICTURES]
        result = figures(measure(Client, store, pixels, Amount(swaps, callers, seconds)))
        less = Amount(control_swaps, CONTROL_CALLERS, CONTROL_SHARE * seconds)
        control = measure(LeakingClient, store, pixels, less)
    result |= {
        "model": options.model,
        "callers": callers,
        "control_growth_bytes": growth_bytes(control.resident),
        "sharing": "one core for all"
        if cores == 1
        else f"publishing on one core, callers and loading on the other {cores - 1}",
        "machine": where,
    }
    if options.quick:
        print(describe(result))
    else:
        reporting.save(f"swap-{options.model}", result, describe(result))


if __name__ == "__main__":
    main()
