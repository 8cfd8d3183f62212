"""What is deleted, and when. Nothing else in the daemon deletes anybody's data.

done/     after `done_days` everything but the records (batch.json, plan.json, report.json, worker.log)
          and the folders in which something was set aside: that was never learnt
held/     never
failed/   never
exams/    never (their number per class is limited when they are kept)
"""

import contextlib
import logging
from datetime import UTC, datetime
from pathlib import Path

from daemon import logs
from daemon.batch import BATCH_FILE, read_batch
from daemon.config import RetentionConfig
from daemon.errors import BatchError
from daemon.plan import PLAN_NAME
from daemon.report import RESULT_DIR
from daemon.requests import drop_old_answers
from daemon.spool import Spool
from deploy import atomic

SECONDS_PER_DAY = 86_400.0
KEPT = {BATCH_FILE, PLAN_NAME, RESULT_DIR, "worker.log"}


def sweep(home: Path, config: RetentionConfig, now: float) -> None:
    """Delete what has been kept long enough; `now` in seconds since the epoch."""
    spool = Spool(home)
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
    with contextlib.suppress(FileNotFoundError):  # fetched while we looked; the others have time
        drop_old_answers(home, datetime.fromtimestamp(now, UTC))


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
    """At start: remove temporary files of writes that a crash cut short, outside spool/ and serving/."""
    for folder in (home, home / "requests", home / "requests" / "done", home / "exams"):
        for path in folder.glob(f"{atomic.TEMPORARY_PREFIX}*"):
            atomic.remove_tree(path)
