"""Times of the week in which learning may happen: read from text, asked about a moment. Pure.

    22:00-06:00              every night
    mon-fri 22:00-06:00      the nights that begin on Monday to Friday
    sat,sun 00:00-24:00      the whole weekend

Wall-clock times of the machine; a window that ends before it begins ends on the next day.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY, _WEEK = 24 * 60, 7 * 24 * 60  # minutes
_FORM = re.compile(r"(?:([a-z,-]+) )?(\d\d):(\d\d)-(\d\d):(\d\d)")
_EXPECTED = "expected for example '22:00-06:00', 'mon-fri 22:00-06:00' or 'sat,sun 00:00-24:00'"


@dataclass(frozen=True)
class Window:
    """One stretch of time that comes again on each of some days; minutes."""

    days: frozenset[int]  # 0: Monday
    start: int  # since midnight
    length: int

    def opens_in(self, moment: datetime) -> int:
        """Minutes until it opens next; 0 while it opens in this very minute."""
        at = _minute_of_week(moment)
        return min((day * _DAY + self.start - at) % _WEEK for day in self.days)

    def is_open(self, moment: datetime) -> bool:
        """Whether a moment lies in it."""
        at = _minute_of_week(moment)
        return any((at - day * _DAY - self.start) % _WEEK < self.length for day in self.days)


def parse_window(text: str) -> Window:
    """Read one window.

    Raises:
        ValueError: it is none; says what was expected.
    """
    match = _FORM.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(_EXPECTED)
    start, end = _minutes(match[2], match[3]), _minutes(match[4], match[5])
    if start in {_DAY, end}:
        raise ValueError(f"a window begins before 24:00 and does not end when it begins; {_EXPECTED}")
    days = _days(match[1]) if match[1] else frozenset(range(7))
    return Window(days, start, end - start if end > start else end - start + _DAY)


def is_open(windows: Sequence[Window], moment: datetime) -> bool:
    """Whether learning may happen; always where there are no windows."""
    return not windows or any(window.is_open(moment) for window in windows)


def next_opening(windows: Sequence[Window], moment: datetime) -> datetime:
    """The wall-clock minute in which the next window opens."""
    minutes = min(window.opens_in(moment) for window in windows)
    return moment.replace(second=0, microsecond=0) + timedelta(minutes=minutes)


def _minute_of_week(moment: datetime) -> int:
    return moment.weekday() * _DAY + moment.hour * 60 + moment.minute


def _minutes(hours: str, minutes: str) -> int:
    found = int(hours) * 60 + int(minutes)
    if int(minutes) >= 60 or found > _DAY:
        raise ValueError(f"{hours}:{minutes} is no time of day; {_EXPECTED}")
    return found


def _days(text: str) -> frozenset[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first not in DAYS or (last or first) not in DAYS:
            raise ValueError(f"{part!r} names no days (mon, tue, wed, thu, fri, sat, sun); {_EXPECTED}")
        begin = DAYS.index(first)
        found |= {(begin + n) % 7 for n in range((DAYS.index(last or first) - begin) % 7 + 1)}
    return frozenset(found)
