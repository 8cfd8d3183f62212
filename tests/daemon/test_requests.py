"""Commands reach a running daemon, and work without one."""

import os
import threading
from datetime import UTC, datetime, timedelta

import pytest

from daemon import requests
from daemon.errors import RequestError
from daemon.lock import HomeLock
from daemon.requests import Answer, Request


@pytest.fixture
def running_daemon(tmp_path):
    """A thread that holds the lock and answers every request with its command's name."""
    stop, seen = threading.Event(), []

    def execute(request):
        seen.append(request)
        return Answer(exit_code=1 if request.why == "fail" else 0, result={"to": request.to})

    def serve():
        while not stop.wait(0.01):
            requests.execute_pending(tmp_path, execute)

    with HomeLock(tmp_path):
        thread = threading.Thread(target=serve)
        thread.start()
        yield seen
        stop.set()
        thread.join()


def refuse(request):
    """Stands for work that the command must leave to the daemon."""
    raise AssertionError("a daemon is running; the command must not do the work itself")


def waiting(home):
    """Names of the requests that nobody executed yet."""
    return list((home / "requests").glob("*.json"))


def test_a_running_daemon_executes_the_request_and_the_command_takes_over_its_outcome(
    tmp_path, running_daemon
):
    """Who asked, what for and why arrive; the exit code comes back."""
    answer = requests.run_or_request(
        tmp_path, Request(command="rollback", to=3, who="ada", why="fail"), refuse
    )

    assert answer == Answer(exit_code=1, result={"to": 3})
    assert [(r.command, r.to, r.who, r.why) for r in running_daemon] == [("rollback", 3, "ada", "fail")]
    assert not waiting(tmp_path)
    assert not list((tmp_path / "requests" / "done").iterdir())


def test_without_a_daemon_the_command_does_the_work_under_the_lock(tmp_path):
    """The same code runs, and nobody else can change the home meanwhile."""
    seen = []

    def execute(request):
        seen.append((request.command, requests_lock_is_held(tmp_path)))
        return Answer(exit_code=0)

    assert requests.run_or_request(tmp_path, Request(command="unpin"), execute).exit_code == 0
    assert seen == [("unpin", True)]
    assert not requests_lock_is_held(tmp_path)


def requests_lock_is_held(home):
    """Whether someone holds the home's lock now."""
    from daemon.lock import holder

    return holder(home) is not None


def test_a_daemon_that_dies_while_the_command_waits_leaves_the_work_to_the_command(tmp_path):
    """The request is withdrawn and done exactly once."""
    lock = HomeLock(tmp_path)
    lock.acquire()
    threading.Timer(0.3, lock.release).start()
    seen = []

    answer = requests.run_or_request(
        tmp_path, Request(command="rollback", to=1), lambda r: seen.append(r.to) or Answer(exit_code=0)
    )

    assert answer.exit_code == 0
    assert seen == [1]
    assert not waiting(tmp_path)


def test_a_daemon_that_does_not_answer_is_reported_and_the_request_withdrawn(tmp_path):
    """No request is left lying about to be executed by surprise."""
    with HomeLock(tmp_path), pytest.raises(RequestError, match=r"did not answer within 0\.2 seconds"):
        requests.run_or_request(tmp_path, Request(command="unpin"), refuse, timeout_seconds=0.2)

    assert not waiting(tmp_path)


def test_a_file_that_is_no_request_is_answered_and_does_not_block_the_next(tmp_path):
    """The oldest file is rubbish; the one behind it is executed all the same."""
    folder = tmp_path / "requests"
    folder.mkdir()
    (folder / "0-rubbish.json").write_text('{"command": "format the disk"}')
    name = requests.leave(tmp_path, Request(command="unpin"))

    executed = requests.execute_pending(tmp_path, lambda r: Answer(exit_code=0))

    assert executed == 2
    assert requests.take_answer(tmp_path, "0-rubbish").exit_code == 2
    assert requests.take_answer(tmp_path, name).exit_code == 0


def test_an_answer_that_comes_at_the_last_moment_counts(tmp_path, monkeypatch):
    """Nothing that happened is reported as withdrawn."""
    withdraw = requests.withdraw

    def answer_first(home, name):
        requests.execute_pending(home, lambda r: Answer(exit_code=0, result={"live": r.to}))
        withdraw(home, name)

    monkeypatch.setattr(requests, "withdraw", answer_first)
    with HomeLock(tmp_path):
        answer = requests.run_or_request(
            tmp_path, Request(command="rollback", to=4), refuse, timeout_seconds=0.2
        )

    assert answer.result == {"live": 4}


def test_a_request_whose_command_no_longer_waits_is_refused(tmp_path):
    """A command killed days ago rolls nothing back when a daemon starts; the one behind it is executed."""
    long_ago = datetime.now(UTC) - timedelta(seconds=requests.TIMEOUT_SECONDS + 5)
    old = requests.leave(tmp_path, Request(command="rollback", to=0, who="ada", created_at=long_ago))
    new = requests.leave(tmp_path, Request(command="rollback", to=3))
    seen = []

    requests.execute_pending(tmp_path, lambda r: seen.append(r.to) or Answer(exit_code=0))

    assert seen == [3]
    assert not waiting(tmp_path)
    assert requests.take_answer(tmp_path, new).exit_code == 0
    answer = requests.take_answer(tmp_path, old)
    assert answer.exit_code == 1
    assert "ada asked for rollback 125 seconds ago" in answer.error
    assert "nothing was done" in answer.error


def test_requests_are_executed_in_the_order_they_were_made(tmp_path):
    """The last of two contradicting commands wins, as its author expects."""
    for target in (3, 1, 2):
        requests.leave(tmp_path, Request(command="rollback", to=target))
    seen = []

    requests.execute_pending(tmp_path, lambda r: seen.append(r.to) or Answer(exit_code=0))

    assert seen == [3, 1, 2]


def test_answers_that_nobody_fetched_are_dropped_after_a_day(tmp_path):
    """A command killed while it waited leaves nothing for ever."""
    name = requests.leave(tmp_path, Request(command="unpin"))
    requests.execute_pending(tmp_path, lambda r: Answer(exit_code=0))
    answer = tmp_path / "requests" / "done" / f"{name}.json"
    now = datetime.now(UTC)

    requests.drop_old_answers(tmp_path, now)
    assert answer.exists()
    os.utime(answer, (0, (now - timedelta(days=2)).timestamp()))
    requests.drop_old_answers(tmp_path, now)
    assert not answer.exists()
