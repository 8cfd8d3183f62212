"""How often a batch is tried: counting, waiting, giving up. Pure functions of batch.json and the
configuration.

Only an attempt that failed by itself counts against `attempts.max`. One that ended because the daemon was
killed or stopped says nothing about the batch, unless it happens again and again without getting any further:
then the batch may be what brings the machine down, and it is put aside too.
"""

from daemon.batch import Batch
from daemon.config import AttemptsConfig

FAILED = "failed: "
INTERRUPTED = "interrupted"
RESTARTED = "restarted: "
MAX_INTERRUPTIONS = 25  # in a row


def failures(batch: Batch) -> list[str]:
    """Why its attempts failed, oldest first."""
    outcomes = [attempt.outcome or "" for attempt in batch.attempts]
    return [outcome.removeprefix(FAILED) for outcome in outcomes if outcome.startswith(FAILED)]


def interruptions(batch: Batch) -> int:
    """How many attempts at the end of the list were cut short, one after the other, and got nowhere."""
    count, furthest = 0, 0
    for attempt in batch.attempts:
        step = attempt.step or 0
        if attempt.outcome not in (INTERRUPTED, None):
            count, furthest = 0, 0  # learning may have started over: any step is one further
        elif step > furthest:
            count, furthest = 0, step
        else:
            count += 1
    return count


def why_give_up(batch: Batch, config: AttemptsConfig) -> str | None:
    """A sentence when the batch is not to be tried again, else None."""
    reasons = failures(batch)
    if len(reasons) >= config.max:
        return f"{len(reasons)} of {config.max} attempts failed; the last one: {reasons[-1]}"
    if interruptions(batch) >= MAX_INTERRUPTIONS:
        return (
            f"the daemon ended {MAX_INTERRUPTIONS} times in a row while learning this batch, "
            "and learning came no further"
        )
    return None


def wait_seconds(batch: Batch, config: AttemptsConfig) -> float:
    """How long to wait before the next attempt: doubled after every failure."""
    count = len(failures(batch))
    return config.backoff_seconds * 2 ** (count - 1) if count else 0.0


def without_repetition(batch: Batch) -> Batch:
    """The record without its last attempt where that ended just like the one before: a trouble that lasts
    for days is one line.
    """
    outcomes = [attempt.outcome for attempt in batch.attempts[-2:]]
    if len(outcomes) == 2 and outcomes[0] == outcomes[1]:
        return batch.model_copy(update={"attempts": batch.attempts[:-1]})
    return batch


def close_interrupted(batch: Batch, *, step: int) -> Batch:
    """The record with an attempt that nobody ended marked as interrupted.

    Args:
        step: how far its checkpoint has come.
    """
    if batch.attempts and batch.attempts[-1].outcome is None:
        return batch.with_outcome(INTERRUPTED, step=step)
    return batch
