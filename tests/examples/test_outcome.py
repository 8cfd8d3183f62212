"""The demo's verdict: a real store and a real client pass, and every broken promise is named."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from outcome import problems, score
from select_images import IMAGES
from traffic import Request, Traffic, swaps

from deploy.client import Client
from deploy.store import VersionStore

Publish = Callable[[Path, int], int]


def requests_to(version: int, count: int, *, start_seconds: float = 0.0) -> list[Request]:
    """Answers 20 ms apart."""
    times = [start_seconds + 0.02 * n for n in range(count)]
    return [Request(at, at + 0.01, version, version) for at in times]


@pytest.fixture
def store(serving_dir: Path, publish_random_version: Publish) -> VersionStore:
    """A store with versions 0 and 1."""
    publish_random_version(serving_dir, 1)
    return VersionStore(serving_dir)


def test_a_version_published_under_traffic_is_seen_without_a_failure(
    serving_dir: Path, publish_random_version: Publish
) -> None:
    """A live client serves both versions, and the recorded requests tell the swap."""
    with Client(serving_dir, threads=1) as client:
        traffic = Traffic(client, serving_dir, IMAGES / "heldout")
        traffic.start()
        publish_random_version(serving_dir, 1)
        deadline = time.monotonic() + 30
        while not any(request.answered == 1 for request in traffic.requests):
            assert time.monotonic() < deadline, client.last_error
            time.sleep(0.01)
        traffic.stop()

    assert [request.error for request in traffic.requests if request.error] == []
    assert {request.answered for request in traffic.requests} == {0, 1}
    assert [swap.version for swap in swaps(traffic.requests)] == [1]


def test_a_demo_that_went_well_has_no_problems(store: VersionStore) -> None:
    """Two hundred answers, both versions seen, no gap, one graph: nothing to complain about."""
    requests = [*requests_to(0, 100), *requests_to(1, 100, start_seconds=2.0)]

    assert problems(requests, store) == []


def test_every_broken_promise_is_named(store: VersionStore) -> None:
    """A failure, few requests, an unseen version and a long gap are each reported in a sentence."""
    failure = Request(1.0, 1.1, 0, None, "ClientError: gone")

    unseen = problems([*requests_to(0, 10), failure], store)
    slow = problems([*requests_to(0, 100), *requests_to(1, 100, start_seconds=2.4)], store)

    assert unseen == [
        "1 requests failed, the first with ClientError: gone",
        "only 11 requests were made, expected at least 200",
        "no answer came from published version 1",
    ]
    assert slow == ["420 ms without an answer while version 1 was taken up, expected at most 100 ms"]


def test_a_changed_graph_is_noticed(store: VersionStore) -> None:
    """The graph files themselves are read, not only what the manifests say of them."""
    graph = store.path(1) / "text_model.onnx"
    graph.chmod(0o644)
    data = bytearray(graph.read_bytes())
    data[-1] ^= 1
    graph.write_bytes(data)

    found = problems([*requests_to(0, 100), *requests_to(1, 100, start_seconds=2.0)], store)

    assert found == ["text_model.onnx has 2 different sha256 over the versions, expected one"]


def test_scores_are_shares_of_all_held_out_images(serving_dir: Path) -> None:
    """The bundled model is no better than it is: far from none and far from all."""
    with Client(serving_dir, threads=1) as client:
        found = score(client, IMAGES)

    assert all(0 < share < 0.5 for share in found)
