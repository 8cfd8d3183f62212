"""A socket that somebody else holds, as systemd does: taken over, kept through a restart, told about."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deploy.errors import ServerError
from deploy.server.inherited import address_of, inherited_listener
from tests.deploy.server.servers import ROOT, Server, ask_pixels, pixels
from tests.deploy.swaps import point, wait_for

# What systemd does between fork and exec: the process is told its own number and finds the socket as 3.
HAND_OVER = """\
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A listening socket on a free loopback port, which stays open whatever the servers do."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen(100)
        yield held


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """What servers started from here tell, one datagram per message."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(tmp_path / "notify"))
        heard.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "8000000")
        yield heard


def hear(manager: socket.socket, *starts: str) -> str:
    """Wait for messages that start so, in this order; the last one."""
    message = ""
    for start in starts:
        while not (message := manager.recv(4096).decode()).startswith(start):
            pass
    return message


def prefix(held: socket.socket) -> list[str]:
    """What goes before the command of a process that inherits the socket as descriptor 3."""
    return [sys.executable, "-S", "-c", HAND_OVER, str(held.fileno())]


def start(store: Path, held: socket.socket, *options: str) -> Server:
    """A server on a socket that is not its own."""
    return Server(store, *options, prefix=prefix(held), inherits=held.fileno())


def refused(store: Path, held: socket.socket, *options: str) -> str:
    """What a server says that does not want to start so."""
    done = subprocess.run(
        [*prefix(held), sys.executable, "-m", "daemon.cli", "serve", "--store", str(store), *options],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, pass_fds=[held.fileno()],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode in (1, 2), done.stderr
    return done.stderr


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.nightly)])
def test_no_request_is_lost_while_the_server_is_started_anew(
    published: Path, listener: socket.socket, workers: str
) -> None:
    """Clients that connect anew for every request, and ones that do not, over an end and a start;
    who comes while there is no server waits for its answer.
    """
    statuses: list[int] = []
    problems: list[str] = []
    is_over = threading.Event()

    def ask(url: str, *, is_new_each_time: bool) -> None:
        headers = {"Connection": "close"} if is_new_each_time else {}
        with httpx.Client(base_url=url, timeout=60, headers=headers) as client:
            while not is_over.is_set():
                try:
                    statuses.append(ask_pixels(client, pixels(1)).status_code)
                except httpx.HTTPError as error:
                    problems.append(repr(error))

    first = start(published, listener, "--workers", workers)
    threads = [
        threading.Thread(target=ask, args=(first.url,), kwargs={"is_new_each_time": bool(number % 2)})
        for number in range(6)
    ]
    try:
        for thread in threads:
            thread.start()
        wait_for(lambda: len(statuses) > 20)
        assert first.stop() == 0
        ended_with = len(statuses)
        second = start(published, listener, "--workers", workers)
        try:
            assert second.url == first.url
            wait_for(lambda: len(statuses) > ended_with + 50)
        finally:
            is_over.set()
            for thread in threads:
                thread.join(60)
            second.close()
    finally:
        is_over.set()
        first.close()

    assert problems == []
    assert set(statuses) == {200}


def test_the_service_manager_hears_what_is_served(
    serving: Path, listener: socket.socket, manager: socket.socket
) -> None:
    """Time to load, ready, the version and the next one, alive, stopping with the time that it may take."""
    server = start(serving, listener, "--drain", "0", "--timeout", "7")
    try:
        hear(manager, "EXTEND_TIMEOUT_USEC=300000000", "STATUS=loading the first version")
        assert hear(manager, "STATUS=") == "STATUS=serving version 0"
        hear(manager, "READY=1")
        hear(manager, "WATCHDOG=1")
        point(serving, 1)
        assert hear(manager, "STATUS=") == "STATUS=serving version 1"
        server.process.send_signal(signal.SIGTERM)
        assert hear(manager, "STOPPING=1") == "STOPPING=1\nEXTEND_TIMEOUT_USEC=17000000"
        assert server.process.wait(60) == 0
    finally:
        server.close()


@pytest.mark.nightly
def test_the_parent_of_several_workers_speaks_for_all(
    serving: Path, listener: socket.socket, manager: socket.socket
) -> None:
    """Also of a version that none of them can load."""
    server = start(serving, listener, "--workers", "2")
    try:
        hear(manager, "STATUS=loading the first version")
        assert hear(manager, "STATUS=") == "STATUS=serving version 0 in 2 workers"
        hear(manager, "READY=1")
        weights = serving / "versions" / "1" / "weights.safetensors"
        weights.chmod(0o644)
        weights.write_bytes(b"no weights")
        point(serving, 1)
        said = hear(manager, "STATUS=serving version 0 in 2 workers; version 1")
        assert "was rejected: " in said
        assert server.stop() == 0
        hear(manager, "STOPPING=1")
    finally:
        server.close()


@pytest.mark.nightly
def test_a_unix_socket_that_is_not_ours_is_left_where_it_is(published: Path, tmp_path: Path) -> None:
    """Systemd made it and will want it again."""
    path = tmp_path / "held.sock"
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(str(path))
        held.listen(10)
        server = start(published, held)
        try:
            assert server.url == f"unix:{path}"
            assert server.client.get("/v2/health/ready").status_code == 200
            assert server.stop() == 0
        finally:
            server.close()
    assert path.is_socket()


def test_a_socket_beyond_this_machine_needs_a_token_too(published: Path) -> None:
    """Whoever made the socket: what it listens on is looked at."""
    with socket.socket() as held:
        held.bind(("0.0.0.0", 0))
        held.listen(10)
        assert "0.0.0.0 can be reached by other machines, and there is no token" in refused(published, held)


def test_an_address_beside_the_socket_is_refused(published: Path, listener: socket.socket) -> None:
    """It would be listened on by nobody."""
    said = refused(published, listener, "--port", "80")
    assert "--port and a socket from systemd exclude each other" in said


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_a_socket_that_nobody_can_connect_to_is_refused(kind: socket.SocketKind) -> None:
    """One for datagrams, one that was never listened on; both are closed."""
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
    with socket.socket(socket.AF_INET, kind) as held:
        held.bind(("127.0.0.1", 0))
        descriptor = os.dup(held.fileno())
        with pytest.raises(ServerError, match="does not listen for connections"):
            inherited_listener(environ, descriptor)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_something_else_than_a_socket_is_refused() -> None:
    """A file under the descriptor that was announced."""
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
    with Path(os.devnull).open() as no_socket, pytest.raises(ServerError, match="a socket that is not there"):
        inherited_listener(environ, no_socket.fileno())


def test_several_sockets_are_refused() -> None:
    """With what to write into the unit."""
    with pytest.raises(ServerError, match=re.escape("ListenStream=")):
        inherited_listener({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "3"})


def test_a_socket_for_another_process_is_not_taken() -> None:
    """LISTEN_PID names whom it is for; the variables go, so that no child takes them for its own."""
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x", "HOME": "/"}
    assert inherited_listener(environ) is None
    assert environ == {"HOME": "/"}


def test_the_address_of_an_inherited_socket_is_that_of_the_settings(
    listener: socket.socket, tmp_path: Path
) -> None:
    """Port or path: what the gate and the banner go by."""
    port = listener.getsockname()[1]
    assert address_of(listener) == {"host": "127.0.0.1", "port": port, "is_inherited": True}
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(str(tmp_path / "s"))
        assert address_of(held) == {"uds": tmp_path / "s", "is_inherited": True}
