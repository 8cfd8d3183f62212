"""Commands for a running daemon: one file each in `requests/`, answered in `requests/done/`.

A command that changes state calls `run_or_request`. With no daemon running it takes the home's lock and does
the work itself, with the same code. With one running it leaves a request (atomic rename), waits for the
answer and takes over its outcome; should the daemon die meanwhile, the request is withdrawn and the command
does the work itself. What takes long stays unanswered while it is under way; a command that is interrupted
withdraws its request, which ends the work.

Requests name their effect, not a change: "roll back to 4", never "one back"; "release the pin on 4"; "the
live version without batch 2". Executing one twice, as after a crash between effect and answer, does what
executing it once does. A request whose command no longer waits is refused: what an operator wanted days ago
must not happen by surprise.
"""

import contextlib
import getpass
import logging
import os
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from daemon import logs
from daemon.errors import LockError, RequestError
from daemon.lock import HomeLock
from deploy import atomic, disk

POLL_SECONDS = 0.05
TIMEOUT_SECONDS = 120.0  # how long a command waits, so how old a request may be that is executed
KEEP_ANSWERS = timedelta(days=1)


def current_user() -> str:
    """Name of the user who runs this process; the number where the system knows no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


Command = Literal[
    "rollback",
    "unpin",
    "pause",
    "resume",
    "promote",
    "revert",
    "thin",
    "rebuild",
    "prune",
    "forget",
    "retry",
    "discard",
]


class Request(BaseModel):
    """One command: what to do, who wants it and why.

    Attributes:
        to: the version to go back to, to release, or to rebuild.
        batch: the one to promote, to revert, to forget, to retry or to discard.
        versions: to thin or to prune.
        insist: revert even where an exam says that too much is lost.
        name: of its file, where a daemon read it from one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: Command
    to: int | None = None
    batch: str | None = None
    versions: tuple[int, ...] = ()
    insist: bool = False
    name: str = Field("", exclude=True)
    who: str = Field(default_factory=current_user)
    why: str = ""
    created_at: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))


class Answer(BaseModel):
    """The outcome of a request: the command's exit code, and its result or a sentence on what went wrong."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    exit_code: int
    result: dict[str, Any] = {}
    error: str | None = None


def run_or_request(
    home: Path,
    request: Request,
    execute: Callable[[Request], Answer],
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
    is_under_way: Callable[[str], bool] = lambda _: False,
) -> Answer:
    """Carry out a command that changes state, through the running daemon or by ourselves.

    Args:
        execute: does the work; called here only while this process holds the home's lock.
        timeout_seconds: how long a running daemon may take to answer, or to begin what takes long.
        is_under_way: whether the daemon is at work on the request of that name; asked while waiting.

    Raises:
        RequestError: a daemon runs but did not answer in time; the request was withdrawn.
    """
    deadline = time.monotonic() + timeout_seconds
    name: str | None = None
    try:
        while time.monotonic() < deadline:
            if name is not None and (answer := take_answer(home, name)) is not None:
                return answer
            try:
                with HomeLock(home, patience_seconds=0.0):
                    # The daemon may have answered and left between the two looks.
                    answer = take_answer(home, name) if name is not None else None
                    return answer or execute(request)
            except LockError:
                name = name or leave(home, request)
                if is_under_way(name):
                    deadline = time.monotonic() + timeout_seconds
                time.sleep(POLL_SECONDS)
    finally:
        if name is not None:
            withdraw(home, name)
    if name is not None and (answer := take_answer(home, name)) is not None:
        return answer  # it came between the last look and the withdrawal
    raise RequestError(
        f"the running daemon did not answer within {timeout_seconds:g} seconds; the request was withdrawn. "
        "Look at `dynlora status` and try again."
    )


def leave(home: Path, request: Request) -> str:
    """Write a request for the running daemon; returns its name. Visible whole or not at all."""
    name = f"{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(4)}"
    folder = home / "requests"
    atomic.make_dir(folder / "done")
    atomic.write_text(folder / f"{name}.json", request.model_dump_json())
    return name


def withdraw(home: Path, name: str) -> None:
    """Take a request back; one that was executed already is no longer there, and that is fine."""
    disk.unlink(home / "requests" / f"{name}.json", missing_ok=True)


def take_answer(home: Path, name: str) -> Answer | None:
    """The answer to a request, removed from disk; None while there is none."""
    path = home / "requests" / "done" / f"{name}.json"
    try:
        answer = Answer.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    disk.unlink(path, missing_ok=True)
    return answer


def is_waiting(home: Path, name: str) -> bool:
    """Whether a request is still wanted: neither answered nor withdrawn."""
    return (home / "requests" / f"{name}.json").exists()


def execute_pending(
    home: Path,
    execute: Callable[[Request], Answer | None],
    answers: dict[str, Answer] | None = None,
    *,
    is_under_way: Callable[[str], bool] = lambda _: False,
) -> int:
    """Execute all waiting requests, oldest first, and answer each; returns how many there were.

    A file that is no request, or whose command no longer waits, is answered with an error and never blocks
    the next one. The answer is written before the request is removed: after a crash in between, the request
    is executed again.

    Args:
        execute: returns None for what takes long and is under way; it is called again until it has an answer.
        answers: what was executed and could not be answered yet, by file name; kept by the caller, so that a
            full disk makes nothing happen twice.
        is_under_way: whether the request of that name was begun; how old it is no longer matters then.

    Raises:
        OSError: an answer could not be written; call again.
    """
    answers = {} if answers is None else answers
    folder = home / "requests"
    paths = sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))
    for withdrawn in answers.keys() - {path.name for path in paths}:
        del answers[withdrawn]
    for path in paths:
        if path.name not in answers:
            with contextlib.suppress(FileNotFoundError):  # withdrawn between listing and reading
                answer = _answer(path, execute, is_old_fine=is_under_way(path.stem))
                if answer is not None:
                    answers[path.name] = answer
    for name, answer in list(answers.items()):
        atomic.make_dir(folder / "done")
        atomic.write_text(folder / "done" / name, answer.model_dump_json())
        atomic.remove_file(folder / name)
        del answers[name]
    return len(paths)


def _answer(path: Path, execute: Callable[[Request], Answer | None], *, is_old_fine: bool) -> Answer | None:
    try:
        request = Request.model_validate_json(path.read_bytes()).model_copy(update={"name": path.stem})
    except ValidationError as error:
        return Answer(exit_code=2, error=f"{path.name} is not a request: {error.errors()[0]['msg']}")
    age_seconds = (datetime.now(UTC) - request.created_at).total_seconds()
    if is_old_fine or age_seconds <= TIMEOUT_SECONDS:
        return execute(request)
    why = (
        f"{request.who} asked for {request.command} {age_seconds:.0f} seconds ago; a command waits "
        f"{TIMEOUT_SECONDS:g} seconds, so nothing was done; run the command again if it is still wanted"
    )
    logs.log("request refused", level=logging.WARNING, why=why)
    return Answer(exit_code=1, error=why)


def drop_old_answers(home: Path, now: datetime) -> None:
    """Remove answers that nobody fetched: their command was killed while it waited."""
    for path in (home / "requests" / "done").glob("*.json"):
        if now.timestamp() - path.stat().st_mtime > KEEP_ANSWERS.total_seconds():
            disk.unlink(path, missing_ok=True)
