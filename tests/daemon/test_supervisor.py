"""The daemon's side of the worker protocol, against real processes."""

import signal
import sys
import threading
import time

import pytest

from daemon.supervisor import Worker, default_command


@pytest.fixture
def start(tmp_path):
    """Start a worker that runs a piece of Python; killed at the end if it is still there."""
    workers = []

    def start(code, wake=None):
        worker = Worker([sys.executable, "-c", code], tmp_path / "worker.log", wake=wake)
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        worker.kill()


def wait(worker, seconds=20.0):
    """Exit code of a worker that ends by itself."""
    deadline = time.monotonic() + seconds
    while (code := worker.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return code


def test_messages_arrive_in_order_and_other_output_is_ignored(start):
    """Lines that a library prints on stdout are no messages of ours."""
    worker = start(
        'print(\'{"event": "phase", "phase": "load"}\'); print(\'Downloading 100%\'); print(\'[1, 2]\');'
        'print(\'{"event": "result"}\')'
    )

    assert wait(worker) == 0
    assert [message["event"] for message in worker.messages()] == ["phase", "result"]
    assert worker.messages() == []


def test_a_message_wakes_the_daemon_at_once(start):
    """The main loop need not poll to notice progress."""
    woken = threading.Event()
    start('import time; print(\'{"event": "result"}\', flush=True); time.sleep(30)', wake=woken.set)

    assert woken.wait(10)


def test_a_failure_is_told_in_the_workers_own_sentence(start):
    """The error event is what the operator reads."""
    worker = start('import sys; print(\'{"event": "error", "message": "no such batch"}\'); sys.exit(1)')

    assert worker.why_it_failed(wait(worker)) == "no such batch"


def test_a_worker_that_dies_without_a_message_is_told_by_its_last_words(start):
    """An exception nobody caught: its last line is in the sentence and the traceback in the log."""
    worker = start("raise RuntimeError('disk on fire')")

    assert worker.why_it_failed(wait(worker)) == (
        "the worker ended with exit code 1; its last words: RuntimeError: disk on fire"
    )


def test_a_killed_worker_is_told_by_its_signal(start):
    """The kernel's out-of-memory killer leaves nothing but a signal."""
    worker = start("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")

    assert "killed by SIGKILL (often: out of memory)" in worker.why_it_failed(wait(worker))


def test_stopping_asks_first_and_gives_time_for_a_checkpoint(start):
    """A worker that obeys SIGTERM ends with its own exit code."""
    worker = start(
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: sys.exit(75));"
        'print(\'{"event": "phase"}\', flush=True); time.sleep(60)'
    )
    while not worker.messages():
        time.sleep(0.01)

    assert worker.stop(timeout_seconds=20) == 75


def test_stopping_does_not_wait_for_ever(start):
    """A worker that ignores SIGTERM is killed when its time is up."""
    worker = start(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        'print(\'{"event": "phase"}\', flush=True); time.sleep(60)'
    )
    while not worker.messages():
        time.sleep(0.01)

    started = time.monotonic()
    assert worker.stop(timeout_seconds=0.2) == -signal.SIGKILL
    assert time.monotonic() - started < 10


def test_the_real_worker_is_this_interpreter_and_knows_its_parent():
    """No other Python and no other daemon package can be picked up by accident."""
    command = default_command("adapt", "--batch", "x")

    assert command[:3] == [sys.executable, "-m", "daemon.worker"]
    assert command[-3:] == ["adapt", "--batch", "x"]
    assert "--parent-pid" in command
