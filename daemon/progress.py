"""What a person sees while something takes long: a bar on a terminal, log lines elsewhere.

Knows how to show progress and nothing of where it comes from. Everything goes to stderr: stdout belongs to
results.
"""

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from daemon import logs

LINE_SECONDS = 10.0
PHASES = {
    "start": "starting the worker",
    "load": "loading the model",
    "look": "looking at images in general",
    "score": "grading the live version",
    "train": "learning",
    "fold": "folding the update",
    "export": "exporting the graphs",
    "verify": "verifying",
    "exam": "grading the candidate",
    "publish": "publishing",
}


class View(Protocol):
    """Shows how far one piece of work has come."""

    def update(self, phase: str, **fields: Any) -> None:
        """Show a phase; `batch`, `step`, `steps`, `loss`, `kept_rank`, `eta_seconds` where known."""

    def clear(self) -> None:
        """Nothing is being worked on now."""


class LineView:
    """A log line for every new phase, and one every ten seconds within it."""

    def __init__(self) -> None:
        self._shown: tuple[object, str] | None = None
        self._shown_at = 0.0

    def update(self, phase: str, **fields: Any) -> None:
        """Log it, unless the same was logged just now."""
        now = time.monotonic()
        key = (fields.get("batch"), phase)
        if key != self._shown or now - self._shown_at >= LINE_SECONDS:
            self._shown, self._shown_at = key, now
            logs.log(phase, **fields)

    def clear(self) -> None:
        """The next update is shown whatever it is."""
        self._shown = None


class BarView:
    """One rich bar: batch, phase, steps, loss, kept rank and the time left."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def update(self, phase: str, **fields: Any) -> None:
        """Move the bar; without steps it only pulses."""
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("", total=None, detail="")
        named = ("command", "batch", "version") if "command" in fields else ("batch",)
        words = [str(fields[key]) for key in named if fields.get(key) is not None]
        self._progress.update(
            self._task,
            description=" ".join([*words, PHASES.get(phase, phase)]),
            total=fields.get("steps"),
            completed=fields.get("step", 0),
            detail="  ".join(figures(fields)),
        )

    def clear(self) -> None:
        """Take the bar off the screen."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._progress.stop()
            self._task = None


class _ConsoleHandler(logging.Handler):
    """Log lines above a bar that stays where it is."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def showing(level: str = "INFO", form: logs.Form = "auto") -> Iterator[View]:
    """Set up log lines and a view for the length of one command.

    A bar only where stderr is a terminal, and the lines are for people.
    """
    console = Console(stderr=True)
    has_bar = console.is_terminal and form in ("auto", "plain")
    view: View = BarView(console) if has_bar else LineView()
    handler: logging.Handler = _ConsoleHandler(console) if has_bar else logging.StreamHandler(sys.stderr)
    restore = logs.configure(handler, level, form)
    try:
        yield view
    finally:
        view.clear()
        restore()


def figures(fields: Mapping[str, Any]) -> list[str]:
    """What is known of steps, loss, kept rank and the time left, in a few words each."""
    parts = []
    if fields.get("steps"):
        parts.append(f"{fields.get('step', 0)}/{fields['steps']}")
    if fields.get("loss") is not None:
        parts.append(f"loss {fields['loss']:.3f}")
    if fields.get("kept_rank") is not None:
        parts.append(f"rank {fields['kept_rank']:g}")
    if fields.get("eta_seconds") is not None:
        parts.append(f"{fields['eta_seconds']:.0f} s left")
    return parts
