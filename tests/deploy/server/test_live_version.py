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
from deploy.server.settings import Settings
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
    published: Path, loaded: LoadedVersion, scenario: Callable[[State, ASGIApp], Awaitable[None]]
) -> None:
    """Run a scenario with an application in this process."""

    async def main() -> None:
        settings = Settings(published, threads=1)
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
