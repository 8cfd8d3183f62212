"""What is deleted, and when. Nothing else in the daemon deletes anybody's data.

done/     after `done_days` everything but the records (batch.json, plan.json, report.json, worker.log)
          and the folders in which something was set aside: that was never learnt
held/     never
failed/   never
exams/    after `exam_days`, by default never. Nothing is rebuilt from them, but later versions, those of a
          revert too, are judged on fewer images. Their hashes stay in batch.json: still never learnt from
events    earlier files (events-<time>.jsonl) after `event_days`, by default never. Manifests and batch.json
          keep what was decided and why; who paused, rolled back or retried is told by events alone
"""

import contextlib
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from daemon import logs
from daemon.batch import BATCH_FILE, read_batch
from daemon.config import RetentionConfig
from daemon.errors import BatchError
from daemon.events import earlier_events, rotated_at
from daemon.exam_embeddings import LEFTOVERS
from daemon.exams import EXAM_FILE
from daemon.plan import PLAN_NAME
from daemon.report import RESULT_DIR
from daemon.requests import drop_old_answers
from daemon.spool import Spool
from deploy import atomic

SECONDS_PER_DAY = 86_400.0
KEPT = {BATCH_FILE, PLAN_NAME, RESULT_DIR, "worker.log"}


def sweep(home: Path, config: RetentionConfig, now: float) -> None:
    """Delete what nobody may be reading and has been kept long enough; `now` in seconds since the epoch."""
    _sweep_done(Spool(home), config, now)
    with contextlib.suppress(FileNotFoundError):  # fetched while we looked; the others have time
        drop_old_answers(home, datetime.fromtimestamp(now, UTC))


def drop_old_exams(home: Path, config: RetentionConfig, now: float) -> Iterator[str]:
    """Delete exams that have been kept long enough, and yield their batches. No worker may be grading."""
    if not config.exam_days:
        return
    for directory in sorted((home / "exams").iterdir()):
        try:
            kept_at = (directory / EXAM_FILE).stat().st_mtime  # written once, when the batch was published
            if directory.name.startswith(".") or now - kept_at < config.exam_days * SECONDS_PER_DAY:
                continue
            # Whoever lists exams sees a whole one or none; what a crash leaves is removed at the next start.
            hidden = directory.with_name(f"{atomic.TEMPORARY_PREFIX}{directory.name}")
            atomic.rename(directory, hidden)
            atomic.remove_tree(hidden)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            logs.log("exam not deleted", level=logging.WARNING, batch=directory.name, why=str(error))
            continue
        yield directory.name


def drop_old_events(home: Path, config: RetentionConfig, now: float) -> Iterator[str]:
    """Delete files of events that have been kept long enough, and yield their names."""
    for path in earlier_events(home) if config.event_days else ():
        if now - rotated_at(path) >= config.event_days * SECONDS_PER_DAY:
            atomic.remove_file(path)
            yield path.name


def is_worth_telling(at: datetime | None, config: RetentionConfig, now: float) -> bool:
    """Whether an event that is missing in the log is so because of a crash, not because it was deleted."""
    if at is None or not config.event_days:
        return True
    return now - at.timestamp() < config.event_days * SECONDS_PER_DAY


def _sweep_done(spool: Spool, config: RetentionConfig, now: float) -> None:
    for batch_id in spool.ids("done"):
        directory = spool.state_dir("done") / batch_id
        try:
            # Written for the last time when the batch was done.
            done_at = (directory / BATCH_FILE).stat().st_mtime
            if now - done_at >= config.done_days * SECONDS_PER_DAY and _clean(directory):
                logs.log("images deleted", batch=batch_id, kept_days=config.done_days)
        except FileNotFoundError:
            continue
        except (OSError, BatchError) as error:
            logs.log("images not deleted", level=logging.WARNING, batch=batch_id, why=str(error))


def _clean(directory: Path) -> bool:
    """Delete what a done batch no longer needs; says whether there was anything."""
    entries = [path for path in directory.iterdir() if path.name not in KEPT]
    if not entries:
        return False
    aside = {Path(item.file).parts[0] for item in read_batch(directory).set_aside}
    doomed = [path for path in entries if path.name not in aside]
    for path in doomed:
        atomic.remove_tree(path)
    return bool(doomed)


def remove_leftovers(home: Path) -> None:
    """At start: remove temporary files of writes that a crash cut short, outside spool/ and serving/.

    Within spool/ only what a worker left that was to promote a held batch.
    """
    folders = ("", "requests/", "requests/done/", "exams/")
    patterns = [f"{folder}{atomic.TEMPORARY_PREFIX}*" for folder in folders]
    for pattern in (*patterns, f"exams/*/{LEFTOVERS}", f"spool/held/*/{LEFTOVERS}"):
        for path in home.glob(pattern):
            atomic.remove_tree(path)
