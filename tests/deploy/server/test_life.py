"""Start, access, overload and end of a server process."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest

from deploy.errors import ServerError
from deploy.server.settings import Limits, Settings, is_loopback, read_token
from tests.deploy.server.servers import ROOT, ask_pixels, jpeg, pixels, serving_process
from tests.deploy.swaps import wait_for

TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """A good token in a private file."""
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o600)
    return path


def test_a_token_opens_what_is_closed_without(published: Path, token_file: Path) -> None:
    """Health and the page are open, all else wants the token, and no process list shows it."""
    with serving_process(published, "--token-file", str(token_file), "--workers", "2") as server:
        client = server.client
        for path in ("/v2/health/live", "/v2/health/ready", "/", "/docs", "/page/page.js", "/openapi.json"):
            assert client.get(path).status_code == 200, path
        for path in ("/version", "/metrics", "/v2", "/v2/models/vision", "/nothing"):
            assert client.get(path).status_code == 401, path
            assert client.get(path, headers={"Authorization": f"Bearer {TOKEN}x"}).status_code == 401, path
        closed = client.post("/classify", content=jpeg())
        assert (closed.status_code, closed.headers["www-authenticate"]) == (401, 'Bearer realm="dynlora"')
        client.headers["Authorization"] = f"Bearer {TOKEN}"
        assert client.get("/version").status_code == 200
        assert client.post("/classify", content=jpeg()).status_code == 200
        for pid in (server.process.pid, *server.workers()):
            assert TOKEN not in Path(f"/proc/{pid}/cmdline").read_text()
            assert TOKEN not in Path(f"/proc/{pid}/environ").read_text()
        assert TOKEN not in server.log


def test_other_machines_are_refused_without_a_token(published: Path) -> None:
    """Unless somebody insists."""
    with pytest.raises(ServerError, match=r"no token: give --token-file FILE"):
        Settings(published, host="0.0.0.0")
    assert Settings(published, host="0.0.0.0", allow_anyone=True).host == "0.0.0.0"
    assert Settings(published, host="::", token=TOKEN).token == TOKEN
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9", "a.org", "")] == [
        True, True, True, True, False, False,
    ]  # fmt: skip


def test_numbers_that_make_no_sense_are_refused(published: Path) -> None:
    """With their names and bounds."""
    with pytest.raises(ServerError, match="max_batch must be from 1 to 1024, found 0"):
        Settings(published, max_batch=0)
    with pytest.raises(ServerError, match="limit labels must be above 0"):
        Settings(published, limits=Limits(labels=0))


def test_settings_survive_the_way_to_a_worker(published: Path) -> None:
    """What a worker reads is what the supervisor was told; the token stays out of every repr."""
    settings = Settings(
        published,
        token=TOKEN,
        trust=published / "keys",
        allow_hosts=("a.example", "b.example"),
        workers=3,
        limits=Limits(images=7),
    )

    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    assert TOKEN not in repr(settings)


def test_a_careless_token_file_is_refused(token_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readable by all, short, or missing; a systemd credential is found by itself."""
    token_file.chmod(0o644)
    with pytest.raises(ServerError, match="chmod 600"):
        read_token(token_file)
    token_file.chmod(0o600)
    token_file.rename(token_file.with_name("dynlora-token"))
    with pytest.raises(ServerError, match="cannot be read"):
        read_token(token_file)
    assert read_token(None) is None
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(token_file.parent))
    assert read_token(None) == TOKEN
    token_file.with_name("dynlora-token").write_text("short")
    with pytest.raises(ServerError, match="at least 16 characters"):
        read_token(None)


def test_a_web_page_cannot_reach_in_through_a_name_of_its_own(http: httpx.Client) -> None:
    """A name that somebody points at 127.0.0.1 is not this machine's."""
    assert http.get("/version", headers={"Host": "evil.example:8000"}).status_code == 403
    assert http.get("/version", headers={"Host": "localhost:1"}).status_code == 200


def test_a_web_page_of_another_site_cannot_keep_us_busy(http: httpx.Client) -> None:
    """A form needs no permission to be sent; our own page names our own address."""
    assert http.get("/version", headers={"Origin": "https://evil.example"}).status_code == 403
    own = str(http.base_url).rstrip("/")
    assert http.get("/version", headers={"Origin": own}).status_code == 200


def test_a_server_answers_to_its_own_address_and_to_the_names_it_was_told(published: Path) -> None:
    """What a proxy passes on among them, with the pages that it serves; other names stay outside."""
    options = ("--host", "127.0.0.2", "--allow-host", "Clip.example.org", "--allow-host", "other.example")
    with serving_process(published, *options) as server:

        def ask(**headers: str) -> int:
            return server.client.get("/version", headers=headers).status_code

        assert server.url.startswith("http://127.0.0.2:")
        assert ask() == 200
        for host in ("127.0.0.1", "127.9.9.9:80", "localhost", "clip.example.org", "other.example:443"):
            assert ask(Host=host) == 200, host
        for host in ("127.evil.example", "evil.example", "clip.example.org.evil.example", "0.0.0.0", ""):
            assert ask(Host=host) == 403, host
        assert ask(Host="clip.example.org", Origin="https://clip.example.org") == 200
        assert ask(Host="127.0.0.1", Origin="https://clip.example.org") == 200
        assert ask(Host="clip.example.org", Origin="https://evil.example") == 403
        refusal = server.client.get("/version", headers={"Host": "evil.example"}).json()["error"]
        assert "--allow-host" in refusal


@pytest.mark.parametrize("name", ["https://clip.example.org", "clip.example.org:8000", "*", "", "a b"])
def test_a_host_that_is_no_name_alone_is_refused(tmp_path: Path, name: str) -> None:
    """Nothing would ever match it."""
    with pytest.raises(ServerError, match="a name or an IPv4 address alone"):
        Settings(tmp_path, allow_hosts=(name,))


def test_a_unix_socket_serves_its_group_alone(published: Path, tmp_path: Path) -> None:
    """With 0660, replaced after a crash, gone after a clean end."""
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with serving_process(published, "--uds", str(path)) as server:
        assert path.stat().st_mode & 0o777 == 0o660
        assert server.client.get("/v2/health/ready").status_code == 200
        assert server.stop() == 0
    assert not path.exists()


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.nightly)])
def test_sigterm_loses_no_request(published: Path, workers: str) -> None:
    """Ready turns false, every request that was sent is answered, connections are ended politely, exit 0."""
    statuses: list[int] = []
    problems: list[str] = []
    began = threading.Barrier(9)

    def ask(url: str) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            ask_pixels(client, pixels(1))
            began.wait(30)
            while True:
                try:
                    answer = ask_pixels(client, pixels(4))
                except httpx.HTTPError as error:
                    problems.append(repr(error))
                    return
                statuses.append(answer.status_code)
                if answer.headers.get("connection") == "close":
                    return

    with serving_process(published, "--workers", workers, "--drain", "2") as server:
        threads = [threading.Thread(target=ask, args=(server.url,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        began.wait(60)
        wait_for(lambda: len(statuses) > 8)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: server.client.get("/v2/health/ready").status_code == 503)
        assert server.client.get("/v2/health/live").status_code == 200
        for thread in threads:
            thread.join(60)
        assert server.process.wait(60) == 0
    assert problems == []
    assert set(statuses) == {200}


def answer_on(connection: socket.socket) -> http.client.HTTPResponse:
    """The next answer on a bare connection, read to its end."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    answer.read()
    return answer


def test_at_the_end_of_a_drain_silence_is_cut_off_and_a_request_that_has_begun_is_answered(
    published: Path,
) -> None:
    """Whoever sent nothing gets nothing and may ask the next server; half a head is somebody asking."""
    with serving_process(published, "--drain", "0.2") as server:
        host, port = server.url.removeprefix("http://").split(":")
        address = host, int(port)
        with (
            socket.create_connection(address, timeout=30) as silent,
            socket.create_connection(address, timeout=30) as kept,
            socket.create_connection(address, timeout=30) as asking,
        ):
            kept.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert answer_on(kept).status == 200
            asking.sendall(b"GET /version HTTP/1.1\r\nHost: loc")
            kept.sendall(b"GET /vers")
            server.client.get("/version")  # all of it has been read by now
            server.process.send_signal(signal.SIGTERM)
            assert silent.recv(1) == b""
            asking.sendall(b"alhost\r\n\r\n")
            kept.sendall(b"ion HTTP/1.1\r\nHost: localhost\r\n\r\n")
            for connection in (asking, kept):
                answer = answer_on(connection)
                assert (answer.status, answer.headers["connection"]) == (200, "close")
                assert connection.recv(1) == b""
        assert server.process.wait(30) == 0


def test_a_head_that_is_never_finished_holds_up_no_end(published: Path) -> None:
    """Some seconds for it, then the process ends."""
    with serving_process(published, "--drain", "0") as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as slow:
            slow.sendall(b"GET /version HTTP/1.1\r\nHost: loc")
            server.client.get("/version")
            begun = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - begun < 20, "--timeout is 30"
            assert slow.recv(1) == b""


def test_too_much_at_once_is_told_to_come_back(published: Path) -> None:
    """429 with Retry-After, at once; those that were taken on are answered."""
    answers: list[httpx.Response] = []
    with serving_process(published, "--max-requests", "2", "--threads", "1") as server:

        def ask() -> None:
            with httpx.Client(base_url=server.url, timeout=60) as client:
                answers.extend(ask_pixels(client, pixels(32)) for _ in range(4))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        text = server.client.get("/metrics").text

    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    rejected = [answer for answer in answers if answer.status_code == 429]
    assert all(answer.headers["retry-after"] == "1" for answer in rejected)
    assert f'outcome="rejected",version="{_version(answers)}"}} {len(rejected)}.0' in text


def _version(answers: list[httpx.Response]) -> str:
    good = next(answer for answer in answers if answer.status_code == 200)
    length = int(good.headers["inference-header-content-length"])
    return str(json.loads(good.content[:length])["model_version"])


def test_a_body_that_never_comes_is_not_waited_for(published: Path) -> None:
    """408 after the time limit, and the place in the queue is free again."""
    with serving_process(published, "--timeout", "0.5", "--max-requests", "1") as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as slow:
            slow.sendall(b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nx")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        wait_for(lambda: server.client.post("/classify", content=jpeg()).status_code in (200, 503))


def test_one_request_in_so_many_is_logged(published: Path) -> None:
    """One JSON line each, without anything secret; by default there are none."""
    with serving_process(published, "--access-log", "1") as server:
        server.client.post("/classify?labels=private", content=jpeg())
        wait_for(lambda: '"path": "/classify"' in server.log)
        line = json.loads(next(line for line in server.lines if "/classify" in line))

    assert line["status"] == 200
    assert line["version"] == 2
    assert "private" not in server.log


def test_metrics_count_what_happened(http: httpx.Client) -> None:
    """By model, version, outcome and stage; the version that answers is told."""
    http.post("/classify", content=jpeg())
    http.post("/classify", content=b"x")
    text = http.get("/metrics").text

    assert 'dynlora_inference_requests_total{model="classifier",outcome="success",version="2"}' in text
    assert 'dynlora_inference_requests_total{model="classifier",outcome="invalid",version="2"}' in text
    assert (
        'dynlora_inference_duration_seconds_bucket{le="0.1",model="classifier",stage="infer",version="2"}'
        in text
    )
    assert 'dynlora_model_version_info{model="text",sha256="' in text
    assert "process_resident_memory_bytes" in text
    assert "dynlora_inference_in_flight 0.0" in text


def test_the_pages_need_nothing_from_elsewhere(http: httpx.Client) -> None:
    """A strict policy, no address of another machine, nothing inline."""
    for path in ("/", "/docs"):
        answer = http.get(path)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert "://" not in answer.text
        assert "style=" not in answer.text
    for name in ("page.js", "docs.js", "page.css"):
        assert "://" not in http.get(f"/page/{name}").text
    assert http.get("/page/..%2Fapp.py").status_code == 404


def test_the_pages_find_their_parts_under_any_path_of_a_proxy(http: httpx.Client) -> None:
    """All that they name is relative to where they are."""
    for page in ("/", "/docs"):
        for target in re.findall(r'(?:href|src)="([^"]*)"', http.get(page).text):
            there = urljoin(f"http://proxy.example/clip{page}", target)
            assert there.startswith("http://proxy.example/clip/"), target
            assert http.get(there.removeprefix("http://proxy.example/clip")).status_code == 200
    for name in ("page.js", "docs.js"):
        assert not re.search(r"""["'`]/""", http.get(f"/page/{name}").text)


def test_the_openapi_document_tells_every_path(http: httpx.Client) -> None:
    """All that is routed is described, and nothing else."""
    found = set(http.get("/openapi.json").json()["paths"])
    models = {f"/v2/models/{m}{v}{s}" for m in ("vision", "text", "classifier")
              for v in ("", "/versions/{version}") for s in ("", "/ready", "/infer")}  # fmt: skip
    others = {"/v2/health/live", "/v2/health/ready", "/v2", "/v2/repository/index", "/classify", "/version",
              "/metrics", "/openapi.json"}  # fmt: skip

    assert found == models | others


def _fuzz(url: str, examples: int, tmp_path: Path) -> subprocess.CompletedProcess:
    program = Path(sys.executable).with_name("schemathesis")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    return subprocess.run(
        [program, "run", f"{url}/openapi.json", "--checks", checks, "--max-examples", str(examples),
         "--request-timeout", "20", "--phases", "examples,coverage,fuzzing" if examples > 5 else "fuzzing",
         "--generation-database", "none", "--seed", "1"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip


@pytest.mark.parametrize(
    "examples", [3, pytest.param(60, marks=[pytest.mark.nightly, pytest.mark.timeout(1200)])]
)
def test_schemathesis_finds_no_fault(published: Path, tmp_path: Path, examples: int) -> None:
    """Whatever the description allows, and much that it does not: no 5xx, no hang, all as described."""
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    with serving_process(published, "--threads", "1") as server:
        done = _fuzz(server.url, examples, tmp_path)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert server.client.get("/v2/health/ready").status_code == 200
        assert "Traceback" not in server.log


def test_the_server_never_loads_torch() -> None:
    """Neither a single process, nor a supervisor, nor a worker."""
    script = (
        "import deploy.server.single, deploy.server.supervisor, deploy.server.worker, daemon.cli_serve, sys\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert not {"torch", "open_clip", "onnx", "dynlora"} & set(done.stdout.split())
    assert "uvicorn" in done.stdout.split()


def test_without_the_extra_the_command_says_what_to_install(tmp_path: Path) -> None:
    """One sentence, exit code 2."""
    (tmp_path / "hide.py").write_text(
        "import importlib.util, sys\nfound = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'starlette' else found(name, *a)\n"
        "from daemon.cli import main\nmain(['serve'])\n"
    )
    done = subprocess.run(
        [sys.executable, "hide.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 2
    assert "starlette not installed" in done.stderr
    assert "pip install 'dynlora[server]'" in done.stderr


def test_an_address_that_is_taken_is_told(published: Path) -> None:
    """One sentence, exit code 1."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "daemon.cli", "serve", "--store", str(published), "--port", port],
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip

    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
