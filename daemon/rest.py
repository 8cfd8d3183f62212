"""Why no batch is learnt now although one could be: an operator paused, the hour is wrong, the day's share is
done.

`paused.json` in the home is the pause; it survives everything, as a pin does. Orders of an operator (promote,
revert) are carried out nevertheless: whoever gives them means it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from daemon import logs
from daemon.config import ScheduleConfig
from daemon.windows import is_open, next_opening, parse_window
from deploy import atomic
from deploy.manifest import Manifest
from deploy.store_reader import StoreReader, Summary

PAUSE_NAME = "paused.json"


class Pause(BaseModel):
    """paused.json: an operator wants nothing to be learnt."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    who: str
    why: str = ""
    since: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))

    @property
    def sentence(self) -> str:
        """For status and log."""
        return f"paused by {self.who}{f' ({self.why})' if self.why else ''}; `dynlora resume` goes on"


@dataclass(frozen=True)
class Rest:
    """Why nothing is learnt; `until` in seconds since the epoch where that is known."""

    reason: Literal["paused", "window", "daily"]
    why: str
    until: float | None = None

    @property
    def interrupts(self) -> bool:
        """Whether a batch at work stops at a checkpoint; one that is within the day's share may finish."""
        return self.reason != "daily"

    def to_dict(self) -> dict[str, Any]:
        """As in status.json."""
        return {"reason": self.reason, "why": self.why, "until": self.until}


def read_pause(home: Path) -> Pause | None:
    """The pause, or None. One that cannot be read is a pause all the same: someone wanted it."""
    path = home / PAUSE_NAME
    try:
        return Pause.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        return Pause(who="someone", why=f"{path} cannot be read", since=datetime.fromtimestamp(0, UTC))


def write_pause(home: Path, pause: Pause) -> None:
    """Learn nothing from now on, durably; a later pause replaces an earlier one."""
    atomic.write_text(home / PAUSE_NAME, pause.model_dump_json(indent=1) + "\n")


def remove_pause(home: Path) -> None:
    """Learn again; harmless where nothing was paused."""
    atomic.remove_file(home / PAUSE_NAME)


def why_rest(
    pause: Pause | None, config: ScheduleConfig, manifests: Iterable[Manifest | Summary], now: float
) -> Rest | None:
    """The reason why nothing may be learnt at `now` (seconds since the epoch), or None.

    Args:
        manifests: of all versions, or their summaries; asked only where the number per day is limited.
    """
    if pause is not None:
        return Rest("paused", pause.sentence)
    moment = datetime.fromtimestamp(now)  # noqa: DTZ006 - windows are wall-clock times of this machine
    windows = [parse_window(text) for text in config.windows]
    if not is_open(windows, moment):
        opening = next_opening(windows, moment)
        why = f"outside the training windows ({', '.join(config.windows)}); goes on at {opening:%a %H:%M}"
        return Rest("window", why, opening.timestamp())
    if config.max_versions_per_day:
        midnight = moment.replace(hour=0, minute=0, second=0, microsecond=0)
        since = midnight.timestamp()
        count = sum(m.kind == "update" and m.created_at.timestamp() >= since for m in manifests)
        if count >= config.max_versions_per_day:
            why = f"{count} versions were published today, as many as schedule.max_versions_per_day allows"
            return Rest("daily", f"{why}; goes on at midnight", (midnight + timedelta(days=1)).timestamp())
    return None


class Resting:
    """Asks for one home, again and again; tells the log when that changes.

    Attributes:
        rest: the last answer.
    """

    def __init__(self, home: Path, store: StoreReader) -> None:
        self._home, self._store = home, store
        self.rest: Rest | None = None

    def look(self, config: ScheduleConfig, now: float) -> Rest | None:
        """Why nothing may be learnt at `now`, in seconds since the epoch, or None.

        Raises:
            StoreError: a version's manifest cannot be read.
        """
        is_limited = config.max_versions_per_day > 0
        summaries = map(self._store.summary, self._store.versions() if is_limited else ())
        before, self.rest = self.rest, why_rest(read_pause(self._home), config, summaries, now)
        if self.rest != before:
            logs.log("resting" if self.rest else "going on", why=self.rest.why if self.rest else None)
        return self.rest
