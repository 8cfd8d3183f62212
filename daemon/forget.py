"""The images of one batch are removed everywhere; what was learnt from them, and its history, stay.

    spool/<state>/<id>/   everything but the records and what was learnt; batch.json without its files' names
    exams/<id>/           as a whole
    inbox/.claimed-<id>   the drop itself, where it could not be moved and was copied

The record is marked first, durably: should the disk or the power fail in between, `finish_forgetting` ends
what was begun. Knows nothing of workers: whoever calls sees to it that none has the batch.
"""

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from daemon.batch import BATCH_FILE, Batch, Forgotten
from daemon.claim import NOT_MOVED
from daemon.errors import RequestError
from daemon.exams import exam_dir
from daemon.inbox import CLAIMED_PREFIX
from daemon.plan import PLAN_NAME
from daemon.report import RESULT_DIR
from daemon.spool import REASON_FILE, STATES, Reason, Spool
from deploy import atomic

KEPT = {BATCH_FILE, PLAN_NAME, RESULT_DIR, REASON_FILE, "worker.log"}
AT_HAND = ("incoming", "queued", "work")  # not settled yet


def forget(home: Path, inbox: Path, batch_id: str, *, who: str, why: str) -> dict[str, Any]:
    """Remove the images of a batch; done twice, it does nothing more.

    One that waits or is at work goes to failed/: what nobody may look at is not learnt from either. The
    caller has thrown away what was learnt of it so far.

    Returns:
        `images`, how many files were removed by place, `state`, and `remains`: sentences on what is left.

    Raises:
        BatchError: there is no such batch, or its record cannot be read.
        RequestError: it is being taken in.
    """
    spool = Spool(home)
    state = spool.find(batch_id)
    if state == "incoming":
        raise RequestError(f"{batch_id} is being taken in: try again in a moment")
    batch = spool.load(batch_id)
    left = [sentence for sentence in batch.warnings if NOT_MOVED in sentence]
    if batch.forgotten is None:
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        batch = batch.as_forgotten(Forgotten(who=who, why=why, at=moment))
        spool.save(batch)
    removed, stuck = _erase(home, inbox, batch)
    return {
        "batch": batch_id,
        "state": spool.find(batch_id),
        "images": dict(removed),
        "remains": [*what_remains(home, batch), *left, *stuck],
    }


def finish_forgetting(home: Path, inbox: Path) -> list[str]:
    """End what a crash cut short; returns the batches concerned."""
    batches = [batch for batch in Spool(home).batches(*STATES[1:]) if batch.forgotten is not None]
    return [batch.id for batch in batches if _erase(home, inbox, batch)[0].total()]


def what_remains(home: Path, batch: Batch) -> list[str]:
    """What is left of a forgotten batch, a sentence each."""
    record = Spool(home).path(batch.id) / BATCH_FILE
    learnt = "what was learnt from the images: the weights of the versions since, and the delta"
    twins = [
        other.id
        for other in Spool(home).batches(*STATES[1:])
        if other.id != batch.id
        and other.forgotten is None
        and (other.duplicate_of == batch.id or other.content_sha256 == batch.content_sha256)
    ]
    again = [f"the same images came again and lie in {', '.join(twins)}: forget these too"] if twins else []
    known = "class names, counts, and the images' hashes, by which they are recognised should they come again"
    return [
        f"{learnt} (`dynlora revert {batch.id}` takes it out of the live version)",
        f"the record {record}: {known}; and what manifests say of the batch",
        "names of files where events.jsonl and logs told of them, and every copy outside this home",
        "its exam is gone: later batches are no longer graded on it",
        *again,
    ]


def _erase(home: Path, inbox: Path, batch: Batch) -> tuple[Counter[str], list[str]]:
    """Remove every file that is not a record.

    Returns:
        How many by place, and a sentence for each drop of another user that we may not remove.
    """
    spool = Spool(home)
    directory = spool.path(batch.id)
    exam = exam_dir(home, batch.id)
    doomed = {
        "spool": [path for path in directory.iterdir() if path.name not in KEPT],
        "exams": [path for path in (exam, _hidden(exam)) if path.exists()],
        "inbox": sorted(inbox.glob(f"{CLAIMED_PREFIX}{batch.id}*")),
    }
    removed, stuck = Counter(dict.fromkeys(doomed, 0)), list[str]()
    for place, paths in doomed.items():
        for path in paths:
            count = sum(file.is_file() for file in path.rglob("*")) if path.is_dir() else 1
            try:
                atomic.remove_tree(_out_of_sight(path))
            except PermissionError as error:
                if place != "inbox":
                    raise
                stuck.append(f"{path} cannot be removed ({error.strerror}): its owner must do that")
                continue
            removed[place] += count
    if spool.find(batch.id) in AT_HAND:
        assert batch.forgotten is not None, "only what is marked is erased"
        reason = "its images were forgotten before it was learnt"
        hint = f"{batch.forgotten.who} wanted it so; nothing is left to do"
        spool.fail(Reason(batch=batch.id, reason=reason, what_to_do=hint, failed_at=batch.forgotten.at))
    return removed, stuck


def _hidden(exam: Path) -> Path:
    return exam.with_name(f"{atomic.TEMPORARY_PREFIX}{exam.name}")


def _out_of_sight(path: Path) -> Path:
    """Rename an exam first: whoever lists them sees a whole one or none."""
    if path.parent.name != "exams" or path.name.startswith(atomic.TEMPORARY_PREFIX):
        return path
    atomic.remove_tree(_hidden(path))
    atomic.rename(path, _hidden(path))
    return _hidden(path)
