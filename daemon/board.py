"""`dynlora status --watch`: the state of a home as a page on a terminal, drawn anew as it changes.

Drawing is a function of what `status.snapshot` says and of a moment; only `watch` reads and waits.
"""

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from daemon.progress import PHASES
from daemon.status import snapshot

REFRESH_SECONDS = 0.5
LOSSES = 48  # of the curve: one for each column
_BARS = "▁▂▃▄▅▆▇█"
_COLOURS = {
    "published": "green",
    "promoted": "green",
    "held": "yellow",
    "failed": "red",
    "reverted": "yellow",
}
_STATES = {"idle": "green", "working": "cyan", "waiting": "red", "pinned": "yellow", "paused": "yellow"}


def watch(home: Path, console: Console) -> None:
    """Draw until Ctrl-C."""
    losses: deque[tuple[str, float]] = deque(maxlen=LOSSES)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            found = snapshot(home)
            remember(losses, found["working"])
            live.update(board(found, time.time(), [loss for _, loss in losses]), refresh=True)
            time.sleep(REFRESH_SECONDS)


def remember(losses: deque[tuple[str, float]], working: Mapping[str, Any] | None) -> None:
    """Keep the loss of the batch at work; what another batch left is forgotten."""
    if working is None or working.get("loss") is None:
        return
    batch = str(working["batch"])
    if losses and losses[-1][0] != batch:
        losses.clear()
    losses.append((batch, float(working["loss"])))


def board(found: Mapping[str, Any], now: float, losses: Sequence[float] = ()) -> RenderableType:
    """The whole page; `now` in seconds since the epoch."""
    parts: list[RenderableType] = [_head(found), _work(found, losses), _queue(found, now)]
    if sentences := _sentences(found):
        parts.append(Panel(Group(*sentences), title="to look at", border_style="red", title_align="left"))
    parts.append(_decisions(found["decisions"]))
    return Group(*parts)


def age(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if minutes < 1:
        return f"{max(0, int(seconds))} s"
    if hours < 1:
        return f"{minutes} min"
    if hours < 48:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def curve(values: Iterable[float]) -> str:
    """A line of bars, the smallest value the lowest."""
    values = list(values)
    if not values:
        return ""
    low, span = min(values), max(values) - min(values)
    return "".join(_BARS[int((value - low) / span * 7.99) if span else 0] for value in values)


def _head(found: Mapping[str, Any]) -> RenderableType:
    state = found["state"] if found["daemon"] else "no daemon is running"
    line = Text.assemble(
        ("dynlora ", "bold"),
        (f" {state} ", f"reverse {_STATES.get(state, 'red' if not found['daemon'] else 'cyan')}"),
        "  ",
        found.get("live_error") or f"version {found['live']} is live",
    )
    if pin := found["pin"]:
        line.append(f", pinned by {pin['who']}", "yellow")
    line.append(f"   {found['home']}", "dim")
    return line


def _work(found: Mapping[str, Any], losses: Sequence[float]) -> RenderableType:
    working = found["revising"] or found["working"]
    if working is None:
        rests = found["rests"]
        text = Text(rests["why"], "yellow") if rests else Text("nothing is being learnt", "dim")
        return Panel(text, title="at work", title_align="left")
    what = working.get("batch") or f"version {working.get('version')}"
    phase = str(working.get("phase", "start"))
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_row(Text(f"{working.get('command', '')} {what}".strip(), "bold"), PHASES.get(phase, phase))
    if steps := working.get("steps"):
        step = working.get("step", 0)
        grid.add_row(f"{step}/{steps}", ProgressBar(total=steps, completed=step))
    figures = [
        f"loss {working['loss']:.3f}" if working.get("loss") is not None else "",
        f"kept rank {working['kept_rank']:.1f}" if working.get("kept_rank") is not None else "",
        f"{age(working['eta_seconds'])} left" if working.get("eta_seconds") is not None else "",
    ]
    if any(figures):
        grid.add_row("   ".join(filter(None, figures)), Text(curve(losses), "cyan"))
    return Panel(grid, title="at work", title_align="left", border_style="cyan")


def _queue(found: Mapping[str, Any], now: float) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    for state, content in by_state(found).items():
        names = content if isinstance(content, list) else []
        count = len(names) if isinstance(content, list) else content
        style = {"failed": "red", "held": "yellow"}.get(state, "") if count else "dim"
        shown = ", ".join(names[:3]) + (f" and {count - 3} more" if len(names) > 3 else "")
        grid.add_row(Text(state, style), Text(str(count), style, justify="right"), Text(shown, style))
    if drop := found.get("taking_in"):
        far = f" {drop['step']}/{drop['steps']}" if drop.get("steps") else ""
        grid.add_row("", "", Text(f"taking in {drop['batch']}: {drop['phase']}{far}", "cyan"))
    if found["oldest_at"] is not None:
        waits = age(max(0.0, now - found["oldest_at"]))
        grid.add_row("", "", Text(f"the oldest drop that is not learnt waits for {waits}", "bold"))
    return Panel(grid, title="batches", title_align="left")


def by_state(found: Mapping[str, Any]) -> dict[str, list[str] | int]:
    """Batches by state, or how many; those in failed/ that nothing is left to do about count as discarded."""
    batches, done_with = dict(found["batches"]), found.get("discarded") or []
    batches["failed"] = [name for name in batches["failed"] if name not in done_with]
    return batches | ({"discarded": len(done_with)} if done_with else {})


def _sentences(found: Mapping[str, Any]) -> list[Text]:
    trouble = [Text(found["trouble"], "red")] if found["trouble"] else []
    untold = [Text(f"mlflow: {found['mlflow']}", "yellow")] if found.get("mlflow") else []
    return [*trouble, *untold, *(Text(sentence) for sentence in found["inbox"])]


def _decisions(decisions: Sequence[Mapping[str, Any]]) -> RenderableType:
    table = Table(box=None, expand=True, show_header=False, padding=(0, 2, 0, 0))
    for column in range(4):
        table.add_column(no_wrap=column < 3, ratio=1 if column == 3 else None, overflow="ellipsis")
    for event in reversed(decisions):
        moment, name, what, why = cells(event)
        table.add_row(Text(moment, "dim"), Text(name, _COLOURS.get(event["event"], "")), what, why)
    return Panel(table, title="last decisions (UTC)", title_align="left")


def cells(event: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """A decision in words: when, what it was, of which batch or version, and why or with which result."""
    moment = datetime.fromisoformat(event["at"]).astimezone(UTC)
    what = str(event.get("batch") or (f"version {event['version']}" if "version" in event else ""))
    return f"{moment:%m-%d %H:%M}", event["event"].replace("_", " "), what, _why(event)


def _why(event: Mapping[str, Any]) -> str:
    if event.get("exam_before") is not None and event.get("exam_after") is not None:
        exam = f"exam {event['exam_before']:.1%} → {event['exam_after']:.1%}"
        return f"version {event['version']}, {exam}"
    words = [f"version {event['version']}" if "version" in event and event.get("batch") else ""]
    return ", ".join(filter(None, [*words, str(event.get("why") or "")]))
