"""The page of `dynlora status --watch`, drawn from what a snapshot says."""

from collections import deque

import pytest
from rich.console import Console

from daemon.board import age, board, curve, remember

AT = 1_770_000_000.0
IDLE = {
    "home": "/srv/home",
    "daemon": 12,
    "state": "idle",
    "live": 3,
    "pin": None,
    "working": None,
    "revising": None,
    "batches": {"incoming": [], "queued": [], "work": [], "held": [], "failed": [], "done": 3},
    "inbox": [],
    "trouble": None,
    "rests": None,
    "oldest_at": None,
    "decisions": [],
}


def drawn(found, losses=(), width=100):
    """The page as text."""
    console = Console(width=width, record=True, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123 - closed with the process
    console.print(board(found, AT, losses))
    return console.export_text()


def test_a_batch_at_work_is_shown_with_bar_loss_rank_time_left_and_the_queue_behind_it():
    """Everything that an operator asks for, on one page."""
    working = {"batch": "000004-cups", "phase": "train", "step": 120, "steps": 480, "loss": 1.25}
    working |= {"kept_rank": 7.5, "eta_seconds": 150.0}
    batches = IDLE["batches"] | {"queued": [f"00000{n}-more" for n in range(5, 10)], "work": ["000004-cups"]}
    held = {"at": "2026-01-31T12:00:00.000+00:00", "event": "held", "batch": "000002-hats", "why": "no gain"}
    published = {"at": "2026-01-31T13:00:00.000+00:00", "event": "published", "batch": "000003-coats"}
    published |= {"version": 3, "exam_before": 0.25, "exam_after": 0.75}
    found = IDLE | {"state": "working", "working": working, "batches": batches, "oldest_at": AT - 8000}
    text = drawn(found | {"decisions": [held, published]}, [2.0, 1.5, 1.25])

    for words in (
        "version 3 is live",
        "000004-cups",
        "learning",
        "120/480",
        "loss 1.250   kept rank 7.5   2 min left",
        "█▃▁",
        "000005-more, 000006-more, 000007-more and 2 more",
        "waits for 2 h 13 min",
        "published",
        "version 3, exam 25.0% → 75.0%",
        "no gain",
    ):
        assert words in text, words
    assert text.index("000003-coats") < text.index("000002-hats"), "the last one first"


def test_why_nothing_goes_on_is_on_the_page():
    """A pause, trouble, what lies unused in the inbox, a daemon that is not there."""
    rests = {"reason": "paused", "why": "paused by ann; `dynlora resume` goes on", "until": None}
    assert "paused by ann; `dynlora resume` goes on" in drawn(IDLE | {"rests": rests})
    text = drawn(IDLE | {"trouble": "the disk is full", "inbox": ["x.rar is not unpacked"]})
    assert "the disk is full" in text
    assert "x.rar is not unpacked" in text
    assert "no daemon is running" in drawn(IDLE | {"daemon": None, "state": "stopped"})


def test_names_from_strangers_are_shown_as_they_are():
    """Square brackets are rich's markup, and a batch may have any name of ours or a reason any text."""
    text = drawn(IDLE | {"inbox": ["[red]boo[/red] is an empty folder"]})

    assert "[red]boo[/red] is an empty folder" in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_page_fits_its_terminal(width):
    """No line is longer than the terminal is wide."""
    found = IDLE | {"inbox": ["a long sentence " * 20], "trouble": "word " * 100}

    assert max(map(len, drawn(found, width=width).splitlines())) <= width


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0 s"), (59.9, "59 s"), (60, "1 min"), (3600, "1 h 0 min"), (200_000, "2 d 7 h")],
)
def test_ages_are_in_the_units_people_use(seconds, words):
    """Two at most."""
    assert age(seconds) == words


def test_a_curve_has_a_bar_for_each_value():
    """Also where all are the same, or none are there."""
    assert curve([]) == ""
    assert curve([1.0, 1.0]) == "▁▁"
    assert curve([0.0, 0.5, 1.0]) == "▁▄█"


def test_the_losses_of_another_batch_are_forgotten():
    """The curve is of the batch at work."""
    losses = deque(maxlen=3)
    for batch, loss in [("a", 3.0), ("b", 2.0), ("b", 1.0), ("b", None)]:
        remember(losses, {"batch": batch, "loss": loss})
    remember(losses, None)

    assert list(losses) == [("b", 2.0), ("b", 1.0)]
