"""Waiting for what other processes do, never for ever: they may die, fail, or say nothing."""

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

_POLL_SECONDS = 0.05
_LAST_BYTES = 2000

Value = TypeVar("Value")


class Companion:
    """A process whose output, stdout and stderr in one, goes to a file.

    Args:
        name: what it is called in messages.
    """

    def __init__(self, name: str, command: Sequence[str], output: Path) -> None:
        self.name, self._output = name, output
        with output.open("wb") as stream:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
            )

    def lines(self) -> list[str]:
        """The complete lines it has written so far."""
        return self._output.read_text(errors="replace").rpartition("\n")[0].splitlines()

    def why_ended(self) -> str | None:
        """How it ended and its last words; None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        last = self._output.read_text(errors="replace")[-_LAST_BYTES:].strip()
        return f"the {self.name} ended with {code}: {last or 'it said nothing'}"


def wait_for(
    look: Callable[[], Value | None], what: str, companions: Sequence[Companion], *, seconds: float
) -> Value:
    """Look again and again until there is something.

    Args:
        what: is waited for, for the message.
        companions: processes without which it will never come.

    Raises:
        RuntimeError: it did not come in time, or one of the processes ended.
    """
    deadline = time.monotonic() + seconds
    while (found := look()) is None:
        for companion in companions:
            if (why := companion.why_ended()) is not None:
                raise RuntimeError(f"{what} will not come: {why}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"no {what} within {seconds:g} seconds")
        time.sleep(_POLL_SECONDS)
    return found
