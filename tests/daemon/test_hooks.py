"""Hooks: real commands and a real server get the events; what they do wrong stays with them."""

import contextlib
import json
import os
import stat
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from daemon.config import HooksConfig
from daemon.config_sources import read_config
from daemon.errors import ConfigError
from daemon.hooks import HookError, Hooks


class Server:
    """An HTTP server that keeps what it gets, and answers as it is told."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.answers: list[int | str] = []  # the next status codes; "drip": a byte now and then
        self.is_over = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.bodies.append(
                    json.loads(body) | {"path": self.path, "type": self.headers["Content-Type"]}
                )
                answer = outer.answers.pop(0) if outer.answers else 204
                if answer == "drip":
                    with contextlib.suppress(OSError):
                        while not outer.is_over.wait(0.05):
                            self.wfile.write(b"H")
                    return
                self.send_response(answer)
                self.send_header("Location", "http://192.0.2.1/elsewhere")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook?of=dynlora"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self.is_over.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server():
    """A server of this test."""
    server = Server()
    yield server
    server.close()


@pytest.fixture
def told():
    """What the daemon would tell."""
    return []


@pytest.fixture
def make(tmp_path, told):
    """Make hooks with some settings; their second try comes at once."""
    made = []

    def hooks(**settings):
        found = Hooks(
            tmp_path,
            HooksConfig(**settings),
            lambda event, **fields: told.append((event, fields)),
            pause_seconds=0.01,
            stop_seconds=0.1,
        )
        made.append(found)
        return found

    yield hooks
    for found in made:
        found.stop()


def program(path: Path, text: str) -> list[str]:
    """A shell script that can be executed, as a command."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(stat.S_IRWXU)
    return [str(path)]


def finish(hooks: Hooks) -> None:
    """Wait until everything was delivered or given up, and hear how it went."""
    deadline = time.monotonic() + 30
    while not hooks.is_idle():
        assert time.monotonic() < deadline
        hooks.report()
        time.sleep(0.005)


def test_a_command_gets_the_event_on_stdin_and_its_main_fields_in_the_environment(make, told, tmp_path):
    """As an argument list, without a shell; in the home."""
    command = program(tmp_path / "hook", 'cat > got.json; echo "$DYNLORA_EVENT $DYNLORA_BATCH $1" > env.txt')
    hooks = make(command=[*command, "a b; rm -rf"])
    hooks.told("published", {"batch": "000001-cups", "version": 3, "who": None})
    finish(hooks)

    got = json.loads((tmp_path / "got.json").read_text())
    assert got.pop("at").endswith("+00:00")
    assert got == {"event": "published", "home": str(tmp_path), "batch": "000001-cups", "version": 3}
    assert (tmp_path / "env.txt").read_text() == "published 000001-cups a b; rm -rf\n"
    [(event, fields)] = told
    assert event == "hook_done"
    assert fields["hook"] == "command"
    assert (fields["of"], fields["batch"], fields["version"], fields["tries"]) == (
        "published",
        "000001-cups",
        3,
        1,
    )


def test_a_webhook_gets_every_event_in_order_as_json(make, server, told):
    """By POST, with path and query as configured."""
    hooks = make(webhook=server.url)
    for number in range(5):
        hooks.told("held", {"batch": f"{number:06d}-x", "why": "no gain – really"})
    finish(hooks)

    assert [body["batch"] for body in server.bodies] == [f"{number:06d}-x" for number in range(5)]
    assert {body["path"] for body in server.bodies} == {"/hook?of=dynlora"}
    assert {body["type"] for body in server.bodies} == {"application/json"}
    assert server.bodies[0]["why"] == "no gain – really"
    assert [event for event, _ in told] == ["hook_done"] * 5


def test_only_the_events_that_are_asked_for_are_delivered(make, server):
    """What begins is not what became of it."""
    hooks = make(webhook=server.url, events=["failed"])
    for event in ("queued", "adapting", "published", "hook_failed", "failed"):
        hooks.told(event, {"batch": "b"})
    finish(hooks)

    assert [body["event"] for body in server.bodies] == ["failed"]


def test_what_fails_is_tried_again_and_what_keeps_failing_is_told(make, server, told):
    """Two errors and then an answer; three errors and then the next event."""
    hooks = make(webhook=server.url, tries=3)
    server.answers = [503, 500, 200]
    hooks.told("published", {"batch": "a"})
    finish(hooks)
    assert [(event, fields["tries"]) for event, fields in told] == [("hook_done", 3)]

    server.answers = [500, 302, 404, 200]
    hooks.told("published", {"batch": "b"})
    hooks.told("published", {"batch": "c"})
    finish(hooks)
    [_, (event, fields), (last, _)] = told
    assert (event, fields["batch"], fields["why"]) == ("hook_failed", "b", "127.0.0.1 answered 404")
    assert last == "hook_done"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("echo oh >&2; echo no; exit 7", "it ended with 7: oh no"),
        ("kill -9 $$", "it ended with -9"),
        ("sleep 300 & sleep 300", "it took longer than 0.2 s and was killed"),
    ],
)
def test_a_command_that_fails_or_hangs_is_told_with_its_last_words(make, told, tmp_path, text, why):
    """One that takes too long is killed with all that it started."""
    hooks = make(command=program(tmp_path / "hook", f"echo $$ > pid; {text}"), timeout_seconds=0.2, tries=1)
    hooks.told("failed", {"batch": "b"})
    finish(hooks)

    [(event, fields)] = told
    assert (event, fields["why"]) == ("hook_failed", why)
    group = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while _is_group_alive(group):
        assert time.monotonic() < deadline


def test_a_command_that_is_not_there_is_told(make, told, tmp_path):
    """The configuration named it, and it was removed since."""
    hooks = make(command=[str(tmp_path / "gone")], tries=2)
    hooks.told("failed", {"batch": "b"})
    finish(hooks)

    assert told[0][1]["why"] == f"{tmp_path}/gone cannot be started: No such file or directory"


def test_a_server_that_drips_is_cut_off_and_one_that_is_not_there_refused(make, server, told):
    """The limit is for the whole exchange, not for each byte."""
    server.answers = ["drip"]
    hooks = make(webhook=server.url, timeout_seconds=0.3, tries=1)
    started = time.monotonic()
    hooks.told("failed", {"batch": "a"})
    finish(hooks)
    assert time.monotonic() - started < 10
    hooks.config = HooksConfig(webhook="http://127.0.0.1:9/", tries=1)
    hooks.told("failed", {"batch": "b"})
    finish(hooks)

    assert [fields["why"] for _, fields in told] == [
        "127.0.0.1: no answer within 0.3 s",
        "127.0.0.1: [Errno 111] Connection refused",
    ]


def test_telling_never_waits_and_never_grows_without_end(make, told, tmp_path):
    """A hook that hangs while a thousand batches come: the rest is told as not delivered."""
    hooks = make(command=program(tmp_path / "hook", "sleep 300"), timeout_seconds=3600)
    started = time.monotonic()
    for number in range(1500):
        hooks.told("published", {"batch": str(number)})
    took = time.monotonic() - started
    hooks.report()

    assert took < 5
    assert {event for event, _ in told} == {"hook_failed"}
    assert 450 < len(told) <= 500


def test_stopping_kills_what_hangs_and_tells_what_was_not_delivered(make, told, tmp_path):
    """The daemon's end takes its time limit and no more."""
    hooks = make(command=program(tmp_path / "hook", "sleep 300"), timeout_seconds=3600)
    for batch in "ab":
        hooks.told("published", {"batch": batch})
    deadline = time.monotonic() + 10
    while hooks._cut is None:
        assert time.monotonic() < deadline
    started = time.monotonic()
    hooks.stop()

    assert time.monotonic() - started < 20
    assert [(event, fields["batch"]) for event, fields in told] == [
        ("hook_failed", "a"),
        ("hook_failed", "b"),
    ]
    assert told[1][1]["why"] == "the daemon ended before it was delivered"


def test_a_try_that_begins_while_the_daemon_ends_is_ended_too(make, server, tmp_path):
    """Command or webhook: whoever stops may have looked just before there was anything to cut."""
    server.answers = ["drip"]
    command = program(tmp_path / "hook", "sleep 300")
    hooks = make(command=command, webhook=server.url, timeout_seconds=20)
    hooks._stopping.set()

    with pytest.raises(HookError, match="ended with -9"):
        hooks._execute(hooks.config, {"event": "published"})
    started = time.monotonic()
    with pytest.raises(HookError):
        hooks._post(hooks.config, {"event": "published"})
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ('command = ["notify.sh"]', "expected the program's absolute path"),
        ('command = "notify.sh"', "hooks.command is 'notify.sh'; expected a valid list"),
        ('webhook = "ftp://host/x"', "expected http://… or https://…"),
        ('webhook = "https://ann:secret@host/"', "without a user name"),
        ('webhook = "https://:secret@host/"', "without a user name"),
        ('webhook = "https://host:port/"', "expected http://… or https://…"),
        ('webhook = "https://host/a b"', "blanks"),
        ('events = ["publish"]', "hooks.events.0 is 'publish'; expected 'published', 'held'"),
        ("tries = 0", "hooks.tries is 0"),
    ],
)
def test_hooks_that_cannot_be_are_refused(tmp_path, line, answer):
    """With the key, the value and what was expected."""
    path = tmp_path / "config.toml"
    path.write_text(f"[hooks]\n{line}\n")

    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert answer in str(caught.value)


def _is_group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    # A zombie that nobody has waited for yet is no longer at work.
    states = [
        _state(path) for path in Path("/proc").iterdir() if path.name.isdecimal() and _group(path) == group
    ]
    return any(state not in ("Z", "") for state in states)


def _fields(path: Path) -> list[str]:
    try:
        return (path / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _state(path: Path) -> str:
    return next(iter(_fields(path)), "")


def _group(path: Path) -> int:
    fields = _fields(path)
    return int(fields[2]) if fields else -1
