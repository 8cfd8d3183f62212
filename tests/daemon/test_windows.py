"""Training windows: which moments lie in them, and when the next one opens."""

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.config_sources import read_config
from daemon.errors import ConfigError
from daemon.windows import DAYS, is_open, next_opening, parse_window

MONDAY = datetime(2026, 1, 5)  # noqa: DTZ001 - windows are wall-clock times
times = st.integers(0, 24 * 60 - 1).map(lambda minute: f"{minute // 60:02}:{minute % 60:02}")
texts = st.builds(
    lambda days, start, end: f"{','.join(days)} {start}-{end}",
    st.lists(st.sampled_from(DAYS), min_size=1),
    times,
    times,
).filter(lambda text: text[-11:-6] != text[-5:])
moments = st.datetimes(datetime(2026, 1, 1), datetime(2027, 1, 1))  # noqa: DTZ001 - as above


@pytest.mark.parametrize(
    ("window", "is_in"),
    [
        ("22:00-06:00", [(0, "22:00"), (0, "00:00"), (1, "05:59")]),
        ("mon-fri 22:00-06:00", [(0, "22:00"), (5, "05:59"), (4, "23:00")]),
        ("sat,sun 00:00-24:00", [(5, "00:00"), (6, "23:59")]),
        ("fri-mon 09:00-10:00", [(4, "09:00"), (0, "09:59"), (6, "09:30")]),
    ],
)
def test_moments_in_a_window(window, is_in):
    """Also after midnight, which belongs to the night before, and around the end of the week."""
    for day, time in is_in:
        assert is_open([parse_window(window)], _at(day, time)), (day, time)


@pytest.mark.parametrize(
    ("window", "is_out"),
    [
        ("22:00-06:00", [(0, "06:00"), (3, "21:59")]),
        ("mon-fri 22:00-06:00", [(0, "05:00"), (5, "22:00"), (6, "03:00")]),
        ("sat,sun 00:00-24:00", [(0, "00:00"), (4, "23:59")]),
        ("fri-mon 09:00-10:00", [(1, "09:30"), (4, "10:00")]),
    ],
)
def test_moments_outside_a_window(window, is_out):
    """The end is no longer in it."""
    for day, time in is_out:
        assert not is_open([parse_window(window)], _at(day, time)), (day, time)


def test_without_windows_it_is_always_time():
    """The default."""
    assert is_open([], MONDAY)


@given(st.lists(texts, min_size=1, max_size=3), moments)
def test_the_next_opening_is_the_first_minute_that_is_open(written, moment):
    """Open then, and closed in every minute from now until then (checked in steps, for it may be a week)."""
    windows = [parse_window(text) for text in written]
    if is_open(windows, moment):
        return
    opening = next_opening(windows, moment)

    assert moment < opening <= moment + timedelta(days=7)
    assert is_open(windows, opening)
    assert not is_open(windows, opening - timedelta(minutes=1))
    step = max(timedelta(minutes=1), (opening - moment) / 97)
    while (moment := moment + step) < opening:
        assert not is_open(windows, moment)


@pytest.mark.parametrize(
    ("window", "answer"),
    [
        ("at night", "expected for example '22:00-06:00'"),
        ("22-06", "expected for example"),
        ("25:00-26:00", "25:00 is no time of day"),
        ("22:75-23:00", "22:75 is no time of day"),
        ("22:00-22:00", "does not end when it begins"),
        ("24:00-06:00", "begins before 24:00"),
        ("monday 22:00-06:00", "'monday' names no days"),
        ("mon- 22:00-06:00 x", "expected for example"),
    ],
)
def test_what_is_no_window_is_refused_with_key_value_and_what_was_expected(tmp_path, window, answer):
    """As every key of the configuration."""
    path = tmp_path / "config.toml"
    path.write_text(f'[schedule]\nwindows = ["{window}"]\n')

    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert "schedule.windows is " in str(caught.value)
    assert f"{window!r} is no window" in str(caught.value)
    assert answer in str(caught.value)


def _at(day: int, time: str) -> datetime:
    hours, minutes = time.split(":")
    return MONDAY + timedelta(days=day, hours=int(hours), minutes=int(minutes))
