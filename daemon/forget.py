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
from daemon.errors import BatchError, RequestError
from daemon.exams import exam_dir
from daemon.inbox import CLAIMED_PREFIX
from daemon.plan import PLAN_NAME
from daemon.report import RESULT_DIR
from daemon.seen import SEEN_NAME, Seen
from daemon.spool import REASON_FILE, STATES, Reason, Spool
from deploy import atomic
from deploy.errors import WeightsError

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
    if state == "failed" and not (spool.path(batch_id) / BATCH_FILE).exists():
        return forget_drop(home, inbox, batch_id, who=who, why=why)
    batch = spool.load(batch_id)
    left = [sentence for sentence in batch.warnings if NOT_MOVED in sentence]
    if batch.forgotten is None:
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        batch = batch.as_forgotten(Forgotten(who=who, why=why, at=moment))
        spool.save(batch)
    _leave_out_names(spool, batch_id, batch.forgotten)
    removed, stuck = _erase(home, inbox, batch)
    return {
        "batch": batch_id,
        "state": spool.find(batch_id),
        "images": dict(removed),
        "remains": [*what_remains(home, batch), *left, *stuck],
    }


def forget_drop(home: Path, inbox: Path, batch_id: str, *, who: str, why: str) -> dict[str, Any]:
    """As `forget`, for a drop in failed/ that never got a record: reason.json says on whose word."""
    spool = Spool(home)
    directory = spool.path(batch_id)
    reason = spool.reason(batch_id) if (directory / REASON_FILE).exists() else None
    if reason is None or reason.forgotten is None:
        by = Forgotten(who=who, why=why, at=datetime.now(UTC).isoformat(timespec="seconds"))
        _leave_out_names(spool, batch_id, by)
    removed, stuck = _remove_files(home, inbox, batch_id)
    remains = f"the record {directory / REASON_FILE}, without any name of a file"
    return {"batch": batch_id, "state": "failed", "images": dict(removed), "remains": [remains, *stuck]}


def finish_forgetting(home: Path, inbox: Path) -> list[str]:
    """End what a crash cut short; returns the batches concerned."""
    spool = Spool(home)
    ended = []
    for batch in list(spool.forgotten(*STATES[1:])):
        _leave_out_names(spool, batch.id, batch.forgotten)
        if _erase(home, inbox, batch)[0].total():
            ended.append(batch.id)
    recordless = [i for i in spool.ids("failed") if not (spool.path(i) / BATCH_FILE).exists()]
    doomed = [batch_id for batch_id in recordless if _is_forgotten(spool, batch_id)]
    return [*ended, *(i for i in doomed if _remove_files(home, inbox, i)[0].total())]


def _is_forgotten(spool: Spool, batch_id: str) -> bool:
    try:
        return spool.reason(batch_id).forgotten is not None
    except BatchError:
        return False


def _leave_out_names(spool: Spool, batch_id: str, by: Forgotten | None) -> None:
    """Write reason.json of a failed batch anew without the names its sender gave files; once is enough.

    What failed at the door names files in its sentence, too; what failed while it was learnt does not.
    """
    if spool.find(batch_id) != "failed" or _is_forgotten(spool, batch_id):
        return
    directory = spool.path(batch_id)
    try:
        kept = spool.reason(batch_id)
        was_learnt = (directory / BATCH_FILE).exists() and bool(spool.load(batch_id).attempts)
    except BatchError:
        kept, was_learnt = None, False
    spool.fail(
        Reason(
            batch=batch_id,
            reason=kept.reason if kept and was_learnt else "it was not taken in; what it named is forgotten",
            what_to_do="nothing is left to do; drop the images again should they be wanted after all",
            failed_at=kept.failed_at if kept else str(by and by.at),
            details=kept.details if kept and was_learnt else [],
            forgotten=by,
        )
    )


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
        *_in_moments(home, batch.id),
        *again,
    ]


def _in_moments(home: Path, batch_id: str) -> list[str]:
    """A sentence, if two moments over all batches have this one's images in them."""
    path = home / SEEN_NAME
    try:
        batches = Seen.load(path).batches
    except (OSError, WeightsError):
        return []  # not there, or damaged: then nothing is made of it
    if batch_id not in batches:
        return []
    others = f", of {len(batches)} batches in all" if len(batches) > 1 else ""
    what = f"mean and covariance of what the model answered to its images{others}"
    return [f"its part in {path}: {what}; no image can be made from them, and a deleted file is begun anew"]


def _erase(home: Path, inbox: Path, batch: Batch) -> tuple[Counter[str], list[str]]:
    """Remove every file that is not a record.

    Returns:
        How many by place, and a sentence for each drop of another user that we may not remove.
    """
    spool = Spool(home)
    removed, stuck = _remove_files(home, inbox, batch.id)
    if spool.find(batch.id) in AT_HAND:
        assert batch.forgotten is not None, "only what is marked is erased"
        reason = "its images were forgotten before it was learnt"
        hint = f"{batch.forgotten.who} wanted it so; nothing is left to do"
        by = {"failed_at": batch.forgotten.at, "forgotten": batch.forgotten}
        spool.fail(Reason(batch=batch.id, reason=reason, what_to_do=hint, **by))
    return removed, stuck


def _remove_files(home: Path, inbox: Path, batch_id: str) -> tuple[Counter[str], list[str]]:
    """As _erase; the batch stays where it is."""
    directory = Spool(home).path(batch_id)
    exam = exam_dir(home, batch_id)
    doomed = {
        "spool": [path for path in directory.iterdir() if path.name not in KEPT],
        "exams": [path for path in (exam, _hidden(exam)) if path.exists()],
        "inbox": sorted(inbox.glob(f"{CLAIMED_PREFIX}{batch_id}*")),
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
