"""The worker as seen from the daemon: start it, hear its progress, stop it, know how it ended.

Knows the protocol (JSON lines on stdout, exit codes) and nothing of batches or versions. The worker is a
child process of its own, so that it can be killed or run out of memory without touching the daemon; it dies
with us because it asks the kernel to (PDEATHSIG), which holds for the thread that started it: start workers
from the main thread.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from deploy import disk

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_STOPPED = 75  # stopped on request after a checkpoint: to be resumed, not a failed attempt
LOG_TAIL_BYTES = 4000
STOP_POLL_SECONDS = 0.05

Message = dict[str, Any]


def default_command(*arguments: str) -> list[str]:
    """The real worker with our interpreter; it is told our pid, so that it can notice our end."""
    return [sys.executable, "-m", "daemon.worker", "--parent-pid", str(os.getpid()), *arguments]


def start_process(
    command: Sequence[str], log_path: Path, *, stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Start a worker's process: its stdout is a pipe, its stderr is appended to the file `log_path`."""
    log = disk.open_file(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        return subprocess.Popen(
            list(command), stdin=stdin, stdout=subprocess.PIPE, stderr=log, env=_environment()
        )
    finally:
        os.close(log)


class Worker:
    """One running worker process.

    Args:
        command: the whole command line, or the process that stood by for it.
        log_path: file that its stderr is appended to; it survives both processes.
        wake: called from a reader thread whenever there is something new to look at.
    """

    def __init__(
        self,
        command: Sequence[str] | subprocess.Popen[bytes],
        log_path: Path,
        *,
        wake: Callable[[], None] | None = None,
    ) -> None:
        self._wake = wake or (lambda: None)
        self._log_path = log_path
        self._messages: deque[Message] = deque()
        self.error: Message | None = None
        if not isinstance(command, subprocess.Popen):
            command = start_process(command, log_path)
        self._process = command
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), name="worker-output")
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    def messages(self) -> list[Message]:
        """Everything it said since the last call, in order."""
        return [self._messages.popleft() for _ in range(len(self._messages))]

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs. All its messages are in by then."""
        code = self._process.poll()
        if code is not None:
            self._reader.join()
        return code

    def stop(self, timeout_seconds: float, should_force: Callable[[], bool] = lambda: False) -> int:
        """Ask it to stop (SIGTERM), wait, then make it (SIGKILL); returns its exit code.

        Args:
            should_force: asked while waiting; True ends the patience at once.
        """
        deadline = time.monotonic() + timeout_seconds
        if self.poll() is None:
            self._process.terminate()
        while self.poll() is None and time.monotonic() < deadline and not should_force():
            time.sleep(STOP_POLL_SECONDS)
        self.kill()
        return self._process.returncode

    def kill(self) -> None:
        """End it at once; as safe as a power cut, which it must survive anyway."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def why_it_failed(self, code: int) -> str:
        """One sentence: the worker's own if it gave one, else how it ended and its last words."""
        if self.error is not None:
            return str(self.error["message"])
        if code < 0:
            name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
            hint = " (often: out of memory)" if code == -signal.SIGKILL else ""
            how = f"the worker was killed by {name}{hint}"
        else:
            how = f"the worker ended with exit code {code}"
        last = _last_line(self._log_path)
        return f"{how}; its last words: {last}" if last else f"{how} without a word"

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                try:
                    message = json.loads(line)
                except ValueError:
                    continue  # a library that prints; it is no message of ours
                if not isinstance(message, dict) or not isinstance(message.get("event"), str):
                    continue
                if message["event"] == "error" and isinstance(message.get("message"), str):
                    self.error = message
                self._messages.append(message)
                self._wake()
        # Its output ends a moment before it does; the daemon is woken when there is an exit code to see.
        self._process.wait()
        self._wake()


def _environment() -> dict[str, str]:
    """Ours, with output unbuffered so that progress arrives when it happens, and this checkout importable.

    Torch's threads sleep while they wait for each other. Left to spin, they take the CPU from whoever serves
    beside them, and once the machine is busy a step takes ten times as long (docs/log.md).
    """
    root = str(Path(__file__).resolve().parent.parent)
    path = os.environ.get("PYTHONPATH")
    return os.environ | {
        "PYTHONUNBUFFERED": "1",
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root,
    }


def _last_line(path: Path) -> str:
    """The last non-empty line of a log that may be long."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
