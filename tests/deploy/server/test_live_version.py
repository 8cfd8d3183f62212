"""Waiting for another version over HTTP; and, in an application of this process, what a fault looks like."""

import asyncio
import http.client
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from starlette.types import ASGIApp

from deploy.runtime import LoadedVersion
from deploy.server.app import build_app
from deploy.server.engine import Engine
from deploy.server.live_version import MAX_WAITING
from deploy.server.metrics import Metrics
from deploy.server.settings import Limits, Settings
from deploy.server.state import State
from deploy.server.versions import Slot, Versions
from tests.deploy.server.servers import jpeg, pixels, serving_process
from tests.deploy.swaps import PUBLISHED, point

WAIT = {"Prefer": "respond-async, wait=20"}
LIVE = str(PUBLISHED - 1)  # of the store that nobody changes
SOON = 10  # seconds; who waits for a version that does not come takes longer


def ask(url: str, *, other_than: str = "0", wait: bool = True) -> httpx.Response:
    """Ask for a version that is not this one."""
    headers = WAIT if wait else {}
    return httpx.get(f"{url}/version", params={"other_than": other_than}, headers=headers, timeout=SOON)


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.nightly)])
def test_who_waits_is_told_of_the_next_version(serving: Path, workers: str) -> None:
    """The question is asked before the switch, the answer comes after it."""
    with serving_process(serving, "--workers", workers) as server, ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, server.url) for _ in range(4)]
        point(serving, 1)

        assert [answer.result().json()["model_version"] for answer in answers] == ["1"] * 4


def test_who_knows_another_version_or_will_not_wait_is_answered_at_once(http: httpx.Client) -> None:
    """A wait would last longer than these clients listen."""
    url = str(http.base_url).rstrip("/")

    assert ask(url, other_than="7").json()["model_version"] == LIVE
    assert ask(url, other_than=LIVE, wait=False).json()["model_version"] == LIVE
    assert ask(url, other_than="-1").status_code == 400


def test_the_end_of_the_server_ends_the_waiting(serving: Path) -> None:
    """Whoever waits is answered and asked to close the connection; exit code 0."""
    with serving_process(serving) as server:
        waiting = http.client.HTTPConnection(str(httpx.URL(server.url).netloc, "ascii"), timeout=SOON)
        waiting.request("GET", "/version?other_than=0", headers=WAIT)  # sent before the next one is asked
        assert server.client.get("/v2/health/ready").status_code == 200
        code = server.stop()
        answer = waiting.getresponse()

    assert (code, answer.status) == (0, 200)
    assert answer.headers["connection"] == "close"


def within(
    published: Path,
    loaded: LoadedVersion,
    scenario: Callable[[State, ASGIApp], Awaitable[None]],
    limits: Limits = Limits(),  # noqa: B008 - it cannot be changed
) -> None:
    """Run a scenario with an application in this process."""

    async def main() -> None:
        settings = Settings(published, threads=1, limits=limits)
        state = State(settings, Versions(), Engine(settings), Metrics("test"))
        state.versions.flip(Slot(loaded, lambda: None))
        try:
            await scenario(state, build_app(state))
        finally:
            await state.versions.shut()
            await asyncio.to_thread(state.engine.close)

    asyncio.run(main())


def test_too_many_that_wait_are_answered_at_once(published: Path, loaded: LoadedVersion) -> None:
    """As many as allowed wait, one more does not; all are counted out again."""

    async def scenario(state: State, app: ASGIApp) -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            ask = {"url": f"/version?other_than={LIVE}", "headers": WAIT}
            waiting = [asyncio.create_task(client.get(**ask)) for _ in range(MAX_WAITING)]
            async with asyncio.timeout(SOON):
                while state.waiting < MAX_WAITING:  # noqa: ASYNC110 - the server tells nobody
                    await asyncio.sleep(0.001)
                assert (await client.get(**ask)).status_code == 200
            assert not any(task.done() for task in waiting)
            state.versions.wake()
            assert {task.status_code for task in await asyncio.gather(*waiting)} == {200}
        assert state.waiting == 0

    within(published, loaded, scenario)


TELLING = [
    ("GET", "/version"),
    ("GET", f"/version?other_than={LIVE}"),
    ("GET", "/v2/models/vision"),
    ("GET", "/v2/models/vision/ready"),
    ("GET", "/v2/models/vision/versions/0"),
    ("GET", "/v2/models/vision/versions/0/ready"),
    ("POST", "/v2/models/vision/versions/0/infer"),
    ("POST", "/v2/repository/index"),
    ("GET", "/openapi.json"),
]


def test_nothing_is_said_of_versions_while_other_workers_may_answer_from_the_next_one(
    published: Path, loaded: LoadedVersion
) -> None:
    """Who was answered from it by one worker is not told by another of the one before, nor of none."""

    async def scenario(state: State, app: ASGIApp) -> None:
        transport = httpx.ASGITransport(app)
        length = {"Inference-Header-Content-Length": "0"}
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            state.versions.close()
            asking = [
                asyncio.create_task(client.request(*each, content=pixels(1).tobytes(), headers=length))
                for each in TELLING
            ]
            await asyncio.sleep(0.2)
            early = [path for (_, path), task in zip(TELLING, asking, strict=True) if task.done()]
            state.versions.flip(Slot(next_one, next_one.close))
            answers = await asyncio.gather(*asking)
        assert early == []
        assert {answer.status_code for answer in answers} == {200}
        assert [answers[place].json()["model_version"] for place in (0, 1)] == ["0", "0"]
        assert answers[2].json()["versions"] == ["0", LIVE]
        assert answers[3].json()["version"] == "0"

    next_one = LoadedVersion(published / "versions/0", threads=1)
    within(published, loaded, scenario)


def test_a_switch_is_waited_for_as_long_as_a_request_may_take(published: Path, loaded: LoadedVersion) -> None:
    """The client is told to come again, not that its request did not arrive."""

    async def scenario(state: State, app: ASGIApp) -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            state.versions.close()
            for path in ("/version", "/v2/models/vision/versions/7/ready"):
                answer = await client.get(path)
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")

    within(published, loaded, scenario, Limits(request_seconds=0.1))


@pytest.mark.parametrize("path", ["/v2/models/vision/infer", "/classify"])
def test_a_fault_of_ours_is_a_500_in_json(
    published: Path, loaded: LoadedVersion, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the paths that pass by the router too: one sentence to the client, the error to the log."""

    def fail(_: object) -> None:
        raise RuntimeError("a secret of the machine")

    monkeypatch.setattr(loaded, "encode_pixels", fail)

    async def scenario(_: State, app: ASGIApp) -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            if path == "/classify":
                answer = await client.post(path, content=jpeg())
            else:
                length = {"Inference-Header-Content-Length": "0"}
                answer = await client.post(path, content=pixels(1).tobytes(), headers=length)
        assert answer.status_code == 500
        assert list(json.loads(answer.content)) == ["error"]
        assert "secret" not in answer.text

    within(published, loaded, scenario)
