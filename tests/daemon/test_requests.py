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
