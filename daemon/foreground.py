"""A worker that a command waits for: run to its end, with its progress shown."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from daemon.errors import ConfigError, WorkerError
from daemon.progress import View
from daemon.supervisor import Worker, default_command

_LOOK_SECONDS = 0.2  # also between two messages, so that a view can show that time goes by


def run_worker(home: Path, arguments: Sequence[str], view: View) -> dict[str, Any]:
    """The fields of its `result` message.

    Raises:
        WorkerError: it failed; carries its own sentence.
        ConfigError: it failed because of what it was told to do.
    """
    wake = threading.Event()
    worker = Worker(default_command(*arguments), home / "worker.log", wake=wake.set)
    phase, steps, result = "start", dict[str, Any](), dict[str, Any]()
    try:
        code = None
        while code is None:
            code = worker.poll()  # before the messages: what it said last is read after its end
            for message in worker.messages():
                if message["event"] == "result":
                    result = message
                elif message["event"] == "phase":
                    phase, steps = message["phase"], {}
                elif message["event"] == "step":
                    steps = {key: value for key, value in message.items() if key != "event"}
            view.update(phase, **steps)
            if code is None:
                wake.wait(_LOOK_SECONDS)
                wake.clear()
    finally:
        worker.kill()
    if code:
        is_usage = worker.error is not None and worker.error.get("fault") == "usage"
        raise (ConfigError if is_usage else WorkerError)(worker.why_it_failed(code))
    return {key: value for key, value in result.items() if key != "event"}
