"""Swapping versions under callers, and what came of it: the machinery of benchmarks.swap."""

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

from benchmarks import models
from deploy.client import Client, ClientEvent
from deploy.opening import open_session
from deploy.store import VersionStore

PICTURES = 4
TOLERANCE = 1e-4  # |difference| of an embedding's element; versions differ by a hundred times as much
LEAST_SWAPS = 3
_KEEP_FULL = 3
_LOAD_SECONDS = 300


class LeakingClient(Client):
    """The negative control: never lets go of a version that it has left."""

    def _release_retired(self) -> None:
        """Keep them all."""


@dataclass
class Caller:
    """One thread that asks again as soon as it has its answer."""

    # Start, seconds, seconds of the thread on a CPU, version.
    requests: list[tuple[float, float, float, int]] = field(default_factory=list)
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
            started, started_cpu = time.perf_counter(), time.thread_time()
            try:
                with client.hold() as loaded:
                    version, embedding = loaded.version, loaded.encode_pixels(pixels)[0]
            except Exception as error:  # noqa: BLE001 - counting what fails is the point
                self.failed.append(repr(error))
                continue
            cpu = time.thread_time() - started_cpu
            self.requests.append((started, time.perf_counter() - started, cpu, version))
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
            store.prune(_KEEP_FULL)
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
    """How many swaps under how many callers; after so many seconds none begins beyond LEAST_SWAPS.

    Attributes:
        is_apart: loading and warming have the publisher's core, not that of the callers.
    """

    swaps: int
    callers: int
    seconds: float
    is_apart: bool = False


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
        cores = sorted(os.sched_getaffinity(0))
        orders = stack.enter_context(publisher(store, Path(folder), pixels))
        client = stack.enter_context(kind(store.serving_dir, threads=1, poll_seconds=0.05, on_event=on_event))
        if amount.is_apart:
            load_on(client, cores[-1])
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
            if not has_loaded.wait(_LOAD_SECONDS):
                raise RuntimeError(
                    f"a version was not loaded in {_LOAD_SECONDS} seconds: {client.last_error}"
                )
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


def load_on(client: Client, core: int) -> None:
    """Keep the client's loading threads to a core; sessions of one thread start no others."""
    thread = client._thread.native_id  # noqa: SLF001 - there is no such setting: a program's own CPU set decides
    assert thread is not None
    os.sched_setaffinity(thread, {core})
    client._background.run(lambda: os.sched_setaffinity(0, {core}))  # noqa: SLF001


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
