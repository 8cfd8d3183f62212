"""A batch that failed or was held gets another chance (retry), or is given up for good (discard).

Both name a state, not a step: done twice, as after a crash before the answer, they do nothing more. Knows
nothing of workers: whoever calls sees to it that none has the batch.
"""

from typing import Any

from daemon.batch import BATCH_FILE, Forgotten
from daemon.claim import read_claim, write_claim
from daemon.errors import RequestError
from daemon.forget import forget, forget_drop
from daemon.publish import Publisher
from daemon.spool import CLAIM_FILE, REASON_FILE, Reason, Spool, State
from deploy import atomic


def retry(publisher: Publisher, batch_id: str) -> dict[str, Any]:
    """Put a batch back where it is tried anew: into queued/, or into incoming/ where it was never taken in.

    Its attempts are cleared and what was learnt of it goes: the live version may be another one by now.

    Returns:
        `batch` and the `state` it is in.

    Raises:
        BatchError: there is no such batch, or its record cannot be read.
        RequestError: it is published, at work, or its images are gone; says what to do instead.
    """
    spool = publisher.spool
    state = _settled(publisher, batch_id, "retry", ("failed", "held", "queued", "incoming"))
    if state == "incoming":  # done before a crash, and on its way already
        return {"batch": batch_id, "state": state}
    if state == "failed" and _was_never_taken_in(spool, batch_id):
        return _take_in_again(spool, batch_id)
    batch = spool.load(batch_id)
    if batch.forgotten is not None:
        gone = f"the images of {batch_id} were removed at {batch.forgotten.at} by {batch.forgotten.who}"
        raise RequestError(f"{gone}: drop them again to have them learnt")
    publisher.discard_learning(batch_id)
    spool.save(batch.model_copy(update={"attempts": []}))
    atomic.remove_file(spool.move(batch_id, "queued") / REASON_FILE)
    return {"batch": batch_id, "state": "queued"}


def discard(publisher: Publisher, batch_id: str, *, who: str, why: str) -> dict[str, Any]:
    """Remove the images of a batch that is not learnt; its record stays in failed/ and says who wanted it.

    Returns:
        As `forget`.

    Raises:
        BatchError: there is no such batch, or its record cannot be read.
        RequestError: it is published, at work or being taken in; says what to do instead.
    """
    spool = publisher.spool
    state = _settled(publisher, batch_id, "discard", ("failed", "held", "queued"))
    inbox = publisher.config.inbox_dir(publisher.home)
    if not (spool.path(batch_id) / BATCH_FILE).exists():
        found = forget_drop(publisher.home, inbox, batch_id, who=who, why=why)
        if (by := spool.reason(batch_id).forgotten) is not None:
            spool.fail(discarded(batch_id, by))
        return found
    if state in ("held", "queued"):
        publisher.discard_learning(batch_id)
    found = forget(publisher.home, inbox, batch_id, who=who, why=why)
    by = spool.load(batch_id).forgotten
    assert by is not None, "forget marks the record"
    spool.fail(discarded(batch_id, by))
    return found | {"state": "failed"}


def discarded(batch_id: str, by: Forgotten) -> Reason:
    """reason.json of a batch that an operator gave up."""
    why = f": {by.why}" if by.why else ""
    hint = "nothing is left to do; drop the images again should they be wanted after all"
    return Reason(
        batch=batch_id, reason=f"discarded by {by.who}{why}", what_to_do=hint, failed_at=by.at, forgotten=by
    )


def _settled(publisher: Publisher, batch_id: str, command: str, states: tuple[State, ...]) -> State:
    """The state of a batch that nobody has at work and that is in no version.

    Raises:
        BatchError, RequestError: see `retry`.
    """
    state = publisher.spool.find(batch_id)
    if state is None:
        publisher.spool.path(batch_id)  # raises: there is none
    published = publisher.store.published_batches().get(batch_id)
    if published is not None:
        raise RequestError(
            f"{batch_id} is published as version {published.version}; `dynlora revert {batch_id}` takes it "
            f"out, `dynlora forget {batch_id}` removes its images"
        )
    if state not in states:
        now = {"work": "is being learnt", "incoming": "is being taken in", "done": "is done with"}
        what = now.get(str(state), f"is in {state}/")
        raise RequestError(
            f"{batch_id} {what}; {command} is for batches in {', '.join(states[:-1])} or {states[-1]}"
        )
    assert state is not None
    return state


def _was_never_taken_in(spool: Spool, batch_id: str) -> bool:
    """Whether it failed at the door: no record, none with a class to learn, or images out of place."""
    directory = spool.path(batch_id)
    if not (directory / CLAIM_FILE).exists():
        return False
    if not (directory / BATCH_FILE).exists():
        return True
    batch = spool.load(batch_id)
    is_whole = all((directory / image.file).exists() for image in batch.images)
    return batch.forgotten is None and not (batch.classes and is_whole)


def _take_in_again(spool: Spool, batch_id: str) -> dict[str, Any]:
    """Intake reads the drop anew, by the configuration of now."""
    directory = spool.path(batch_id)
    has_reason, has_record = (directory / REASON_FILE).exists(), (directory / BATCH_FILE).exists()
    if has_reason and (forgotten := spool.reason(batch_id).forgotten) is not None:
        raise RequestError(
            f"what was sent as {batch_id} was removed at {forgotten.at} by {forgotten.who}: drop it again"
        )
    write_claim(read_claim(directory).model_copy(update={"attempts": 0}), directory)
    if has_record and not spool.load(batch_id).classes:
        atomic.remove_file(directory / BATCH_FILE)  # another configuration may find classes in it
    atomic.remove_file(spool.move(batch_id, "incoming") / REASON_FILE)
    return {"batch": batch_id, "state": "incoming"}
