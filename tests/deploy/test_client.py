"""The client follows `current`: never a failed or mixed answer, whatever is published under it."""

import fcntl
import gc
import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.client import Client, ClientEvent
from deploy.errors import ClientError
from deploy.runtime import LoadedVersion
from deploy.store import VersionStore
from tests.deploy.swaps import PICTURES, PUBLISHED, count_loads, kinds, open_below, point, wait_for

SWAPS = 5


def expected_answers(serving: Path, version: int) -> tuple[np.ndarray, dict[str, float]]:
    """Return the embeddings of PICTURES and the first one's scores, from the version itself."""
    with LoadedVersion(serving / "versions" / str(version)) as loaded:
        answer = loaded.classify(PICTURES[:1], top=100)[0]
        return loaded.encode_images(PICTURES), {p.label: p.score for p in answer}


def test_follows_current_within_a_second(serving: Path, events: list[ClientEvent]) -> None:
    """At the default poll rate a new version is noticed within a second; answers name it from then on."""
    with Client(serving, on_event=events.append) as own:
        assert own.classify(PICTURES[:1])[0].version == 0
        started = time.monotonic()
        point(serving, 1)
        wait_for(lambda: own.version == 1)
        took = time.monotonic() - started
        wait_for(lambda: len(events) == 3)
        noticed = took - events[1].seconds

        print(f"live after {took:.2f} s: noticed after {noticed:.2f} s, loaded in {events[1].seconds:.2f} s")
        assert noticed < 1
        assert own.classify(PICTURES[:1])[0].version == 1
        assert kinds(events) == [("loaded", 0), ("loaded", 1), ("released", 0)]


def test_answers_are_those_of_the_version_they_name(following: Client, serving: Path) -> None:
    """Embeddings, scores and class names all come from the live version, going forth and back."""
    for version in (0, 1, 2, 0, 1):
        point(serving, version)
        wait_for(lambda version=version: following.version == version)
        embeddings, scores = expected_answers(serving, version)
        found, (answer,) = following.encode_images(PICTURES), following.classify(PICTURES[:1], top=100)

        assert found.version == answer.version == version
        assert np.abs(np.asarray(found) - embeddings).max() <= 1e-5
        assert {p.label: p.score for p in answer.predictions} == pytest.approx(scores, abs=1e-4)
        assert following.encode_texts(["a cat"]).values.shape == (1, 128)
        assert len(following.class_names) == len(scores)


def test_no_request_fails_or_is_mixed_while_versions_are_swapped(
    serving_dir: Path, publish_random_version: Callable[[Path, int], int], events: list[ClientEvent]
) -> None:
    """Four threads in a closed loop over five swaps: no failure, every answer of one version."""
    for seed in range(1, SWAPS + 1):
        publish_random_version(serving_dir, seed)
    point(serving_dir, 0)
    answers: list[tuple[float, float, int, str, Any]] = []
    stop = threading.Event()

    def ask(own: Client, worker: int) -> list[int]:
        seen: list[int] = []
        while not stop.is_set():
            started = time.monotonic()
            if worker % 2:
                found = own.encode_images(PICTURES)
                version, kind, value = found.version, "embeddings", found.values
            else:
                (answer,) = own.classify(PICTURES[:1], top=100)
                version, kind = answer.version, "scores"
                value = {p.label: p.score for p in answer.predictions}
            answers.append((started, time.monotonic(), version, kind, value))
            seen.append(version)
        return seen

    with Client(serving_dir, on_event=events.append) as own, ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(ask, own, worker) for worker in range(4)]
        try:
            for version in range(1, SWAPS + 1):
                point(serving_dir, version)
                wait_for(lambda version=version: any(answer[2] == version for answer in answers[-50:]))
        finally:
            stop.set()
        per_thread = [future.result() for future in futures]  # raises what a request raised

    expected = {version: expected_answers(serving_dir, version) for version in range(SWAPS + 1)}
    for _, _, version, kind, value in answers:
        if kind == "embeddings":
            assert np.abs(value - expected[version][0]).max() <= 1e-5
        else:
            assert value == pytest.approx(expected[version][1], abs=1e-4)
    apart = min(float(np.abs(expected[v][0] - expected[v + 1][0]).max()) for v in range(SWAPS))
    ends = sorted(answer[1] for answer in answers)
    longest = max(after - before for before, after in itertools.pairwise(ends))
    print(
        f"{len(answers)} requests over {SWAPS} swaps, 0 failed; longest gap between answers "
        f"{longest * 1e3:.0f} ms; neighbouring versions differ by at least {apart:.2g}"
    )
    assert apart > 1e-4, "the versions must differ by more than the tolerance, or mixing could not show"
    assert {answer[2] for answer in answers} == set(range(SWAPS + 1))
    for seen in per_thread:
        assert seen == sorted(seen), "a thread saw an older version again"
    assert [version for kind, version in kinds(events) if kind == "loaded"] == list(range(SWAPS + 1))


def test_a_request_is_answered_by_the_version_it_started_on(following: Client, serving: Path) -> None:
    """A switch during a request changes nothing for it; the old version stays until it is done."""
    embeddings, _ = expected_answers(serving, 0)
    with following.hold() as held:
        point(serving, 1)
        wait_for(lambda: following.version == 1)
        following.refresh()

        assert np.abs(held.encode_images(PICTURES) - embeddings).max() <= 1e-5
        assert held.version == 0
        assert following.classify(PICTURES[:1])[0].version == 1


def test_a_switch_waits_for_no_lock_that_a_request_may_hold(following: Client, serving: Path) -> None:
    """A caller put to sleep at the worst moment does not keep the others from the new version."""
    with following._live._idle:  # as a caller that was just being counted
        point(serving, 1)
        wait_for(lambda: following.version == 1)

        assert following.classify(PICTURES[:1])[0].version == 1


def test_the_old_version_is_freed_after_its_last_request(
    following: Client, serving: Path, events: list[ClientEvent]
) -> None:
    """Sessions, files and the lock go when the last request ends, and not in that request's thread."""
    old_dir = serving / "versions" / "0"
    threads: list[str] = []
    following._on_event = lambda event: threads.append(f"{event.kind} by {threading.current_thread().name}")
    with following.hold() as held:
        reference = weakref.ref(held)
        point(serving, 1)
        wait_for(lambda: following.version == 1)
        following.refresh()
        assert open_below(old_dir)
        assert not _can_be_pruned(old_dir)
    del held
    wait_for(lambda: "released by dynlora-client" in threads)
    gc.collect()

    assert reference() is None
    assert open_below(old_dir) == []
    assert _can_be_pruned(old_dir)
    assert not _can_be_pruned(serving / "versions" / "1")


def test_the_store_does_not_prune_what_a_client_uses(following: Client, serving: Path) -> None:
    """Pruning passes over a version with a running request, and takes it afterwards."""
    store = VersionStore(serving)
    point(serving, 1)
    wait_for(lambda: following.version == 1)
    with following.hold():
        point(serving, 2)
        wait_for(lambda: following.version == 2)
        (serving / "versions/3").mkdir()  # a newer version, so that 1 is neither live nor its parent
        _fake_successor(serving, 3)
        point(serving, 3)

        assert store.prune(keep_full=1) == []
    following.refresh()

    assert store.prune(keep_full=1) == [1]


def _fake_successor(serving: Path, version: int) -> None:
    """Turn an empty directory into a copy of version 2 with another number."""
    directory = serving / "versions" / str(version)
    shutil.copytree(serving / "versions/2", directory, dirs_exist_ok=True)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest |= {"version": version, "parent": version - 1}
    (directory / "manifest.json").chmod(0o644)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def _can_be_pruned(directory: Path) -> bool:
    with (directory / "manifest.json").open() as manifest:
        try:
            fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_a_version_is_loaded_once_however_many_ask(serving: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight threads that refresh at the same moment, and the poll, cause a single load."""
    loads = count_loads(monkeypatch)
    with Client(serving, poll_seconds=0.01) as own, ThreadPoolExecutor(8) as pool:
        point(serving, 1)
        assert set(pool.map(lambda _: own.refresh(), range(16))) == {1}

    assert loads == ["0", "1"]


def test_nothing_is_written_into_the_store(serving: Path) -> None:
    """A read-only store can be followed; names and time stamps below it stay as they were."""
    for path in sorted(serving.rglob("*"), reverse=True):
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)

    def look() -> list[tuple[str, int, int]]:
        places = [serving / "versions", *(serving / "versions").rglob("*")]
        return sorted((str(p), p.stat().st_mtime_ns, p.stat().st_ctime_ns) for p in places)

    before = look()
    with Client(serving, poll_seconds=0.01) as own:
        own.classify(PICTURES, ["zebra", "cat"])
        point(serving, 1)
        wait_for(lambda: own.version == 1)
        own.classify(PICTURES, ["zebra", "cat"])

    assert look() == before


def test_labels_asked_about_before_are_ready_in_the_next_version(following: Client, serving: Path) -> None:
    """The first request after a switch does not pay for embedding the labels again."""
    following.classify(PICTURES[:1], ["zebra", "okapi", "cat"])
    point(serving, 1)
    wait_for(lambda: following.version == 1)

    with following.hold() as loaded:
        assert loaded.version == 1
        assert set(loaded.remembered_labels()) == {"zebra", "okapi"}


def test_the_last_thing_before_a_switch_is_a_run_at_normal_priority(
    following: Client, serving: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches asked for lately run at low priority; a picture alone runs after them, and not twice over."""
    following.classify(PICTURES[:2], ["cat"])
    runs: list[tuple[str, int]] = []
    run = LoadedVersion.encode_pixels

    def note(loaded: LoadedVersion, pixel_values: np.ndarray) -> np.ndarray:
        runs.append((threading.current_thread().name.partition("_")[0], len(pixel_values)))
        return run(loaded, pixel_values)

    monkeypatch.setattr(LoadedVersion, "encode_pixels", note)
    point(serving, 1)
    wait_for(lambda: following.version == 1)

    assert runs == [*[("dynlora-load", 2)] * 2, *[("dynlora-client", 1)] * 2]


def test_close_waits_for_running_requests_and_frees_everything(serving: Path) -> None:
    """A request that runs while the client closes is answered; then nothing is left open."""
    own = Client(serving)
    answered = []

    def ask() -> None:
        with own.hold() as loaded:
            begun.set()
            time.sleep(0.2)
            answered.append(loaded.encode_images(PICTURES).shape)

    begun, request = threading.Event(), threading.Thread(target=ask)
    request.start()
    begun.wait()
    own.close()

    assert answered == [(3, 128)]
    assert not own._thread.is_alive()
    assert open_below(serving / "versions") == []
    with pytest.raises(ClientError, match="closed"):
        own.classify(PICTURES)
    own.close()


def test_a_callback_may_use_and_even_close_the_client(serving: Path) -> None:
    """Events are delivered outside of all locks, and a callback that fails harms nobody."""
    seen = []

    def on_event(event: ClientEvent) -> None:
        seen.append((event.kind, event.version))
        if event.kind == "loaded" and event.version == 1:
            seen.append(("live", own.refresh()))
            raise RuntimeError("a careless callback")
        if event.kind == "loaded" and event.version == 2:
            own.close()

    own = Client(serving, poll_seconds=0.01, on_event=on_event)
    point(serving, 1)
    wait_for(lambda: ("released", 0) in seen)
    point(serving, 2)
    wait_for(lambda: not own._thread.is_alive())

    assert ("live", 1) in seen
    with pytest.raises(ClientError, match="closed"):
        own.encode_texts(["a"])


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_poll_interval_must_be_positive(seconds: float, serving: Path) -> None:
    """A client that would poll without a pause is refused."""
    with pytest.raises(ClientError, match="poll_seconds must be above 0"):
        Client(serving, poll_seconds=seconds)


def test_memory_does_not_grow_with_every_swap(serving: Path) -> None:
    """A dozen swaps leave a process where it was; one that kept its old versions would show it."""
    script = f"""
import os
from pathlib import Path
from deploy.client import Client
from deploy.runtime import LoadedVersion

serving = Path({str(serving)!r})

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

sizes = []
with Client(serving, poll_seconds=60, threads=1) as client:
    for swap in range(1, 25):
        (serving / "next").symlink_to(f"versions/{{swap % {PUBLISHED}}}")
        (serving / "next").replace(serving / "current")
        assert client.refresh() == swap % {PUBLISHED}
        client.encode_texts(["a cat"])
        sizes.append(resident_bytes())
kept = [LoadedVersion(serving / "versions" / "1", threads=1) for _ in range(6)]
[version.check_parity() for version in kept]
print(sizes[11], max(sizes[16:]) - max(sizes[:12]), resident_bytes() - sizes[-1])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    start_bytes, growth_bytes, kept_bytes = map(int, done.stdout.split())

    print(f"resident: {start_bytes / 1e6:.0f} MB, {growth_bytes / 1e6:+.1f} MB over 12 swaps")
    print(f"control, six versions kept: {kept_bytes / 1e6:+.0f} MB")
    assert growth_bytes < 30e6
    assert kept_bytes > 45e6


def test_a_client_starts_without_torch(serving: Path) -> None:
    """Importing, classifying and switching load neither torch, open_clip nor onnx."""
    script = f"""
import sys
from deploy.client import Client
with Client({str(serving)!r}) as client:
    client.classify([{str(serving.parent / "picture.png")!r}], ["cat", "dog"])
assert not {{"torch", "open_clip", "onnx", "torchvision", "dynlora", "daemon"}} & set(sys.modules)
"""
    (serving.parent / "picture.png").write_bytes(PICTURES[0])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
