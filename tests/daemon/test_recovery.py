"""What a listing calls for, over every listing there can be."""

import itertools
from datetime import UTC, datetime

import pytest

from daemon.attempts import (
    FAILED,
    INTERRUPTED,
    MAX_INTERRUPTIONS,
    RESTARTED,
    close_interrupted,
    failures,
    interruptions,
    wait_seconds,
    why_give_up,
)
from daemon.batch import Attempt, Batch
from daemon.config import AttemptsConfig
from daemon.recovery import WorkListing, missing_events, next_step
from deploy.manifest import BatchInfo, ImageCounts, LineageEntry, Manifest

LIVE = 5
CONFIG = AttemptsConfig(max=3, backoff_seconds=10)


def batch(*outcomes, number=1, **fields):
    """A batch record with attempts that ended so."""
    attempts = [
        Attempt(n=n, started_at=f"2026-01-0{number}T00:00:0{n % 10}+00:00", outcome=outcome)
        for n, outcome in enumerate(outcomes, start=1)
    ]
    identity = f"{number:06d}-cups"
    return Batch(
        id=identity,
        seq=number,
        slug="cups",
        kind="folders",
        received_at="2026-01-01T00:00:00+00:00",
        content_sha256="0" * 64,
        classes=[],
        images=[],
        attempts=attempts,
        **fields,
    )


def manifest(version, batch_id=None):
    """A manifest as far as the events need it."""
    common = {"architecture": "a", "embed_dim": 1, "context_length": 1, "logit_scale": 1.0, "files": {}}
    created_at = datetime(2026, 1, 1, 0, version, tzinfo=UTC)
    if batch_id is None:
        return Manifest(version=version, kind="initial", created_at=created_at, **common)
    info = BatchInfo(
        id=batch_id,
        classes=("cups",),
        images=ImageCounts(train=1, tune=0, exam=0),
        content_sha256="0" * 64,
    )
    lineage = (LineageEntry(batch=batch_id, delta_sha256="0" * 64),)
    return Manifest(
        version=version,
        parent=version - 1,
        kind="update",
        batch=info,
        lineage=lineage,
        created_at=created_at,
        **common,
    )


LISTINGS = [
    WorkListing(published, report, plan, has_staging=staging)
    for published, report, plan, staging in itertools.product(
        (None, 4, LIVE), (None, 3, LIVE), (None, 3, LIVE), (False, True)
    )
]


@pytest.mark.parametrize("listing", LISTINGS)
def test_every_listing_has_one_safe_next_step(listing):
    """A published batch is only ever finished; nothing learnt on another parent is ever judged or resumed."""
    step = next_step(listing, LIVE)

    assert (step == "finish") == (listing.published_as is not None)
    if step == "judge":
        assert listing.report_parent == LIVE
        assert listing.has_staging
    if step == "redo":
        assert listing.report_parent == LIVE
        assert not listing.has_staging
    if step == "resume":
        assert listing.report_parent is None
        assert listing.plan_parent in (None, LIVE)
    if step == "restart":
        assert LIVE not in (listing.report_parent, listing.report_parent or listing.plan_parent)


@pytest.mark.parametrize("listing", LISTINGS)
def test_going_on_always_ends(listing):
    """Each step changes the listing so that finishing is a few steps away, from wherever the crash was."""
    after = {
        "redo": WorkListing(plan_parent=listing.plan_parent),
        "restart": WorkListing(),
        "resume": WorkListing(report_parent=LIVE, plan_parent=LIVE, has_staging=True),
        "judge": WorkListing(published_as=LIVE + 1, report_parent=LIVE, plan_parent=LIVE),
    }
    steps = [next_step(listing, LIVE)]
    while steps[-1] != "finish":
        steps.append(next_step(after[steps[-1]], LIVE))
        assert len(steps) <= 6


def test_only_failures_count_against_the_limit():
    """Being stopped or restarted says nothing about the batch."""
    record = batch(f"{FAILED}x", INTERRUPTED, f"{RESTARTED}y", f"{FAILED}z", None)

    assert failures(record) == ["x", "z"]
    assert interruptions(record) == 1
    assert why_give_up(record, CONFIG) is None
    assert why_give_up(batch(*[f"{FAILED}{n}" for n in "abc"]), CONFIG) == (
        "3 of 3 attempts failed; the last one: c"
    )


def test_a_batch_that_takes_the_daemon_down_again_and_again_is_put_aside():
    """It may be what brings the machine down; a failure in between starts the count anew."""
    assert why_give_up(batch(*[INTERRUPTED] * (MAX_INTERRUPTIONS - 1)), CONFIG) is None
    assert "times in a row" in why_give_up(batch(*[INTERRUPTED] * MAX_INTERRUPTIONS), CONFIG)
    mixed = [*[INTERRUPTED] * (MAX_INTERRUPTIONS - 1), f"{FAILED}x", INTERRUPTED]
    assert why_give_up(batch(*mixed), CONFIG) is None


def test_a_batch_whose_checkpoint_gets_further_is_not_what_brings_the_daemon_down():
    """A long batch on a machine that is killed every hour ends all the same."""

    def reached(*steps):
        """Cut short at these steps."""
        record = batch(*[INTERRUPTED] * len(steps))
        closed = [a.model_copy(update={"step": s}) for a, s in zip(record.attempts, steps, strict=True)]
        return record.model_copy(update={"attempts": closed})

    often = MAX_INTERRUPTIONS + 5
    assert why_give_up(reached(*range(1, often)), CONFIG) is None
    assert why_give_up(reached(*[0] * (MAX_INTERRUPTIONS - 1), 1, 1, 1), CONFIG) is None
    assert interruptions(reached(0, 7, 7, 0, 7)) == 3, "beginning again and coming as far is no progress"
    assert "came no further" in why_give_up(reached(3, *[3] * MAX_INTERRUPTIONS), CONFIG)


def test_the_wait_doubles_with_every_failure():
    """10, 20, 40 seconds; none after an interruption alone."""
    assert [wait_seconds(batch(*[f"{FAILED}x"] * n), CONFIG) for n in range(4)] == [0, 10, 20, 40]
    assert wait_seconds(batch(INTERRUPTED), CONFIG) == 0


def test_closing_marks_only_an_attempt_without_an_outcome():
    """What is known about an attempt is never overwritten."""
    closed = close_interrupted(batch(f"{FAILED}x", None), step=4).attempts[-1]
    assert (closed.outcome, closed.step) == (INTERRUPTED, 4)
    done = batch(f"{FAILED}x")
    assert close_interrupted(done, step=4) is done
    assert close_interrupted(batch(), step=4) == batch()


def test_missing_events_are_exactly_what_the_files_say_and_the_log_does_not():
    """One event per version and per batch held, failed or a duplicate; those told already not again."""
    known = [
        {"event": "initialised", "version": 0},
        {"event": "published", "batch": "000001-cups", "version": 1},
        {"event": "held", "batch": "000003-cups"},
    ]
    published = [manifest(n, f"{n:06d}-cups") for n in (1, 2, 7)]
    listed = [
        ("done", batch(number=1)),
        ("done", batch(number=2)),
        ("held", batch("held", number=3)),
        ("failed", batch(f"{FAILED}x", number=4)),
        ("done", batch(number=5, duplicate_of="000001-cups")),
        ("queued", batch(number=6)),
        ("work", batch(None, number=7)),
    ]
    batches = {record.id: (state, lambda record=record: record) for state, record in listed}

    found = [
        (e["event"], e["batch"], e.get("version"), e["late"])
        for e in missing_events(known, {m.version: m for m in (manifest(0), *published)}, batches)
    ]

    assert found == [
        ("published", "000002-cups", 2, True),
        ("failed", "000004-cups", None, True),
        ("duplicate", "000005-cups", None, True),
    ]
