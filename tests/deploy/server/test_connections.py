"""What a connection may hold, and for how long, before it has asked anything."""

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.deploy.server.servers import Server, jpeg, serving_process
from tests.deploy.swaps import wait_for

HEAD = b"GET /version HTTP/1.1\r\nHost: localhost\r\n"
MOST = 8


@pytest.fixture(scope="module")
def strict(published: Path) -> Iterator[Server]:
    """A server with little patience and few connections."""
    with serving_process(published, "--timeout", "0.4", "--max-connections", str(MOST)) as server:
        yield server


@contextlib.contextmanager
def connected(server: Server, sent: bytes = b"") -> Iterator[socket.socket]:
    """A bare connection on which something was sent."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(sent)
        yield connection


def answer_on(connection: socket.socket) -> tuple[int, dict[str, str]]:
    """Status and JSON of the next answer."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer.status, json.loads(answer.read())


def peak_memory(server: Server) -> int:
    """The most bytes that the process has had in memory so far."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def is_closed(connection: socket.socket) -> bool:
    """The server has ended it."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_headers_without_end_are_refused_before_they_fill_the_memory(server: Server) -> None:
    """In the head and after a body; the connection is closed while the client goes on sending."""
    chunked = (
        b"POST /classify HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"
    )
    before = peak_memory(server)
    for begun in (HEAD, chunked):
        for line in (b"x-a: " + b"a" * 65000 + b"\r\n", b"a" * 65000):
            with connected(server, begun) as connection, pytest.raises(OSError):  # noqa: PT012 - one of many
                for _ in range(1000):
                    connection.sendall(line)
    assert peak_memory(server) - before < 30 << 20


@pytest.mark.parametrize("where", ["header", "path"])
def test_a_large_head_is_told_so(server: Server, where: str) -> None:
    """431 in JSON, though all of it came at once; somewhat below the limit it is answered."""
    for length, status in ((50_000, 200), (70_000, 431)):
        head = {
            "header": HEAD + b"x-a: " + b"a" * length,
            "path": b"GET /version?" + b"a" * length + b" HTTP/1.1\r\nHost: localhost",
        }[where]
        with connected(server, head + b"\r\n\r\n") as connection:
            found, document = answer_on(connection)
            assert found == status
            if status == 431:
                assert "65536 bytes" in document["error"]
                assert is_closed(connection)


def test_a_large_body_is_no_large_head(server: Server) -> None:
    """Head and body arrive in the same pieces."""
    answer = server.client.post("/classify", content=jpeg(size=(700, 600)), headers={"x-a": "a" * 30_000})
    assert answer.status_code == 200


@pytest.mark.parametrize("sent", [b"", b"\r\n\r\n", HEAD], ids=["silence", "blank lines", "half a head"])
def test_who_does_not_finish_a_first_head_is_cut_off(strict: Server, sent: bytes) -> None:
    """Silence, blank lines, half a head; the time limit of requests holds for heads as well."""
    with connected(strict, sent) as connection:
        begun = time.monotonic()
        assert is_closed(connection)
        assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("asked", "sent"),
    [(HEAD, HEAD), (HEAD, b"\r\n"), (HEAD + b"Content-Length: 9\r\n", b"x")],
    ids=["half a head", "a blank line", "half a body"],
)
def test_who_sends_no_further_head_after_an_answer_is_cut_off(
    strict: Server, asked: bytes, sent: bytes
) -> None:
    """What came, and is no request, stops the clock of those that are idle."""
    with connected(strict, asked + b"\r\n") as connection:
        assert answer_on(connection)[0] == 200
        connection.sendall(sent)
        begun = time.monotonic()
        assert is_closed(connection)
        assert time.monotonic() - begun < 5


def test_a_connection_that_has_asked_may_be_silent_for_longer(strict: Server) -> None:
    """Clients keep connections between requests."""
    with connected(strict, HEAD + b"\r\n") as connection:
        assert answer_on(connection)[0] == 200
        time.sleep(0.8)
        connection.sendall(HEAD + b"\r\n")
        assert answer_on(connection)[0] == 200


def test_connections_beyond_the_limit_are_refused_and_places_come_back(strict: Server) -> None:
    """503 at once; those that are there go on being answered."""
    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(connected(strict, HEAD + b"\r\n")) for _ in range(MOST - 1)]
        for connection in kept:
            assert answer_on(connection)[0] == 200
        stack.enter_context(connected(strict))
        with connected(strict) as refused:
            status, document = answer_on(refused)
            assert (status, "--max-connections" in document["error"]) == (503, True)
        kept[0].sendall(HEAD + b"\r\n")
        assert answer_on(kept[0])[0] == 200
    wait_for(lambda: httpx.get(f"{strict.url}/version").status_code == 200)


@pytest.mark.nightly  # some seconds, until all buffers are full
def test_who_reads_no_answers_is_given_up(strict: Server) -> None:
    """Asking on and on without reading keeps no connection."""
    host, port = strict.url.removeprefix("http://").split(":")
    with socket.socket() as greedy:
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        greedy.connect((host, int(port)))
        greedy.settimeout(0.1)

        def is_given_up() -> bool:
            try:
                greedy.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
            except TimeoutError:
                return False
            except OSError:
                return True
            return False

        wait_for(is_given_up)
