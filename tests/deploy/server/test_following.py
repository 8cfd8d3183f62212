"""One process or several: the server follows `current`, and no answer goes back in time."""

import contextlib
import os
import re
import signal
import threading
from pathlib import Path
from typing import Self

import numpy as np
import pytest

from deploy.runtime import LoadedVersion
from tests.deploy.server.servers import Server, ask_pixels, binary_outputs, pixels, serving_process
from tests.deploy.swaps import PUBLISHED, opened, point, wait_for

PROCESSES = [("--workers", "1"), ("--workers", "2")]


class Traffic:
    """Clients that ask all the time and check each answer against the history of `current`.

    ``published`` lists what was live, in order. An answer that is told to somebody who asked after an
    answer from place k of that list must come from place k or later.
    """

    def __init__(self, server: Server, expected: dict[int, np.ndarray], clients: int = 4) -> None:
        self.published = [0]
        self.problems: list[str] = []
        self.answers = 0
        self._newest = 0
        self._lock = threading.Lock()
        self._expected = expected
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(server,)) for _ in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self, server: Server) -> None:
        import httpx

        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not self._is_over.is_set():
                known = self._newest
                try:
                    answer = ask_pixels(client, PIXELS)
                    answer.raise_for_status()
                    header, [found] = binary_outputs(answer)
                    self._check(int(header["model_version"]), found, known)
                except (httpx.HTTPError, AssertionError) as error:
                    self.problems.append(repr(error))

    def _check(self, version: int, found: np.ndarray, known: int) -> None:
        np.testing.assert_allclose(found, self._expected[version], atol=1e-5)
        places = [place for place in range(known, len(self.published)) if self.published[place] == version]
        with self._lock:
            self.answers += 1
            if places:
                self._newest = max(self._newest, places[0])
            else:
                self.problems.append(f"version {version} after place {known} of {self.published}")


PIXELS = pixels(1)


@pytest.fixture(scope="module")
def expected(published: Path) -> dict[int, np.ndarray]:
    """What each version says about PIXELS."""
    answers = {}
    for version in range(PUBLISHED):
        with LoadedVersion(published / "versions" / str(version)) as loaded:
            answers[version] = loaded.encode_pixels(PIXELS)
    return answers


def swap(server: Server, serving: Path, traffic: Traffic, version: int) -> None:
    """Make a version live and wait until the server says so."""
    traffic.published.append(version)
    point(serving, version)
    wait_for(lambda: server.version() == version)
    answered = traffic.answers
    wait_for(lambda: traffic.answers > answered + 4)


@pytest.mark.parametrize("processes", PROCESSES)
def test_versions_only_go_forward_under_load(serving: Path, expected, processes) -> None:
    """Forth and back: no failed request, no mixed and no older answer, no metrics of what is not loaded."""
    with serving_process(serving, *processes) as server, Traffic(server, expected) as traffic:
        for version in (1, 2, 0):
            swap(server, serving, traffic, version)
        previous = ask_pixels(server.client, PIXELS, "2")
        gone = ask_pixels(server.client, PIXELS, "1")
        metrics = server.client.get("/metrics").text

    assert traffic.problems == []
    assert binary_outputs(previous)[0]["model_version"] == "2"
    assert gone.status_code == 404
    told = re.findall(r'^dynlora_inference_requests_total\{.*version="(\d+)"', metrics, re.MULTILINE)
    assert set(told) == {"0", "2"}
    assert 'version="1"' not in metrics
    print(f"{traffic.answers} answers")


@pytest.mark.nightly
@pytest.mark.parametrize("processes", [("--workers", "2"), ("--workers", "4")])
def test_versions_only_go_forward_over_many_swaps(serving: Path, expected, processes) -> None:
    """The same over twenty swaps, and with more workers than cores."""
    with serving_process(serving, *processes) as server, Traffic(server, expected, clients=8) as traffic:
        for count in range(1, 21):
            swap(server, serving, traffic, count % PUBLISHED)

    assert traffic.problems == []
    assert traffic.answers > 200


@pytest.mark.parametrize("processes", [pytest.param(PROCESSES[0], marks=pytest.mark.nightly), PROCESSES[1]])
def test_a_damaged_version_leaves_the_old_one_serving(serving: Path, expected, processes) -> None:
    """It is reported, and served once it is repaired."""
    weights = serving / "versions/1/weights.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-8] + bytes(8))
    with serving_process(serving, *processes) as server, Traffic(server, expected) as traffic:
        point(serving, 1)
        wait_for(lambda: "other content than was published" in server.log)
        assert server.version() == 0
        assert server.client.get("/v2/health/ready").status_code == 200
        assert 'dynlora_swaps_total{outcome="failure"} 1.0' in server.client.get("/metrics").text
        traffic.published.append(1)
        weights.write_bytes(sound)
        wait_for(lambda: server.version() == 1)

    assert traffic.problems == []


@pytest.mark.nightly
def test_a_worker_that_dies_is_replaced(serving: Path) -> None:
    """The new one starts with the version that is agreed, and with the one before it."""
    with serving_process(serving, "--workers", "2") as server:
        point(serving, 1)
        wait_for(lambda: server.version() == 1)
        victims = server.workers()
        for victim in victims:
            others = set(server.workers())
            os.kill(victim, signal.SIGKILL)
            wait_for(lambda others=others: set(server.workers()) - others and len(server.workers()) == 2)
            wait_for(lambda: all(_holds(pid, 0) and _holds(pid, 1) for pid in server.workers()))
        for _ in range(6):
            with contextlib.closing(_fresh(server)) as client:
                answers = [ask_pixels(client, PIXELS, name) for name in ("", "1", "0")]
            versions = [int(binary_outputs(answer)[0]["model_version"]) for answer in answers]
            assert versions == [1, 1, 0]
        assert server.stop() == 0


@pytest.mark.nightly
def test_a_worker_that_hangs_does_not_hold_the_others_up(serving: Path) -> None:
    """It is killed before the others answer from the new version, so it can never answer from the old one."""
    with serving_process(serving, "--workers", "2") as server:
        wait_for(lambda: all(_holds(pid, 0) for pid in server.workers()))
        hanging = server.workers()[0]
        os.kill(hanging, signal.SIGSTOP)
        point(serving, 1)
        wait_for(lambda: "version 1 is live" in server.log)

        assert hanging not in server.workers()
        wait_for(lambda: sum(_holds(pid, 1) for pid in server.workers()) == 2)


def _holds(pid: int, version: int) -> bool:
    """Whether a worker has a version loaded."""
    return any(f"/versions/{version}/" in path for path in opened(pid))


def _fresh(server: Server):
    import httpx

    return httpx.Client(base_url=server.url, timeout=60)
