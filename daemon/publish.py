"""From a worker's report to a live version, or to held/. Every step may be cut short and is harmless to
repeat.

    judge    report → gate → publish (staging → versions/N → current), or hold (spool/held/<id>)
    finish   exam images → exams/<id>, batch → done/<id>, old versions pruned
    revise   what an operator ordered (a batch promoted or reverted) → versions/N → current

Knows nothing of workers; the service says when.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from daemon import logs, seen
from daemon.batch import Batch
from daemon.config import Config
from daemon.errors import WorkerError
from daemon.exam_embeddings import EMBEDDINGS_NAME, LEFTOVERS
from daemon.exams import keep_exam
from daemon.gate import decide
from daemon.plan import CHECKPOINT_DIR, PLAN_NAME, read_plan
from daemon.recovery import WorkListing, publication
from daemon.report import DECISION_NAME, RESULT_DIR, Report, load_report, staging_name
from daemon.spool import Spool
from deploy import atomic
from deploy.errors import VerifyError
from deploy.manifest import DELTA_NAME, Decision, FileRecord, Manifest
from deploy.store import VersionStore
from deploy.verify import check_files

Tell = Callable[..., None]
_RECORDS = TypeAdapter(dict[str, FileRecord])


@dataclass
class Publisher:
    """The publishing side of one home.

    Attributes:
        config: replaced when the daemon reads its configuration again.
        tell: called with an event's name and fields once its effect is on disk.
    """

    home: Path
    config: Config
    spool: Spool
    store: VersionStore
    tell: Tell

    def look(self, batch_id: str) -> WorkListing:
        """What lies on disk for a batch in work/."""
        work_dir = self.spool.state_dir("work") / batch_id
        published = self.store.published_batches().get(batch_id)
        report, plan = _readable_report(work_dir), read_plan(work_dir)
        return WorkListing(
            published_as=published.version if published else None,
            report_parent=report.parent if report else None,
            plan_parent=plan.parent if plan else None,
            has_staging=self.staging_dir(batch_id).is_dir(),
        )

    def staging_dir(self, batch_id: str) -> Path:
        """Where the worker stages this batch's version."""
        return self.store.staging_dir(batch_id)

    def whole_candidates(self) -> list[str]:
        """The batches in work/ whose worker was done: their report is there and their staged version whole.

        Every file is read, for a crash may have taken what was written but not yet flushed.
        """
        return [batch_id for batch_id in self.spool.ids("work") if self._is_whole(batch_id)]

    def _is_whole(self, batch_id: str) -> bool:
        report = _readable_report(self.spool.state_dir("work") / batch_id)
        if report is None or not self.staging_dir(batch_id).is_dir():
            return False
        try:
            check_files(self.staging_dir(batch_id), _RECORDS.validate_python(report.manifest.get("files")))
        except (OSError, ValidationError, VerifyError) as error:
            logs.log("staged version dropped", level=logging.WARNING, batch=batch_id, why=str(error))
            return False
        return True

    def judge(self, batch_id: str, now: datetime) -> Decision:
        """Decide about the finished candidate and act on it.

        Raises:
            WorkerError: what the worker left cannot be published; the live version is what it was.
            StoreError, VerifyError, OSError: publishing failed; the live version is what it was.
        """
        work_dir = self.spool.state_dir("work") / batch_id
        report = load_report(work_dir / RESULT_DIR)
        for sentence in report.warnings:
            _warn(batch_id, sentence)
        decision = decide(report.exams, self.config.exam)
        batch = self.spool.load(batch_id)
        if decision.outcome == "hold":
            self._hold(batch, report, decision)
        else:
            version = self.store.publish(self.staging_dir(batch_id), self._manifest(report, decision, now))
            self.finish(batch_id, version)
        return decision

    def revise(self, report: Report, decision: Decision, *, operator: str) -> int:
        """Publish what an operator ordered, and return its version.

        Raises:
            WorkerError: what the worker left cannot be published; the live version is what it was.
            StoreError, VerifyError, OSError: publishing failed; the live version is what it was.
        """
        staging = self.store.staging_dir(staging_name(report.manifest["kind"], report.batch))
        manifest = self._manifest(report, decision, datetime.now(UTC), operator=operator)
        version = self.store.publish(staging, manifest)
        if manifest.kind == "promote":
            self.finish(report.batch, version)
        else:
            self._tell_of(version)
            self.prune()
        return version

    def finish_promoted(self) -> None:
        """Finish the held batches that are published: a crash came between the two."""
        published = self.store.published_batches()
        for batch_id in self.spool.ids("held"):
            if batch_id in published:
                self.finish(batch_id, published[batch_id].version)

    def finish(self, batch_id: str, version: int) -> None:
        """Do what is left to do for a batch that is published; only then are old versions pruned.

        It lies in work/, or in held/ where it was promoted. Where publishing broke off its version is made
        live first, unless an operator rolled back meanwhile: then the event names the version that is `live`
        instead.
        """
        self.store.complete()
        live = self.store.current()
        work_dir = self.spool.path(batch_id)
        batch = self.spool.load(batch_id)
        if self.config.exam.keep and batch.forgotten is None:
            limit = self.config.exam.max_images_per_class
            keep_exam(self.home, batch, work_dir, max_images_per_class=limit)
        seen.add_own(self.home, batch_id, work_dir, warn=partial(_warn, batch_id))
        if (work_dir / EMBEDDINGS_NAME).exists():
            atomic.remove_file(work_dir / EMBEDDINGS_NAME)  # it is in the exam, if there is one
        atomic.remove_tree(work_dir / CHECKPOINT_DIR)
        if (work_dir / RESULT_DIR).is_dir():
            atomic.remove_file(work_dir / RESULT_DIR / DELTA_NAME)  # it is in the version
        if batch.attempts:
            instead = "" if live == version else f", but version {live} was made live"
            self.spool.save(batch.with_outcome(f"published as version {version}{instead}"))
        self.spool.move(batch_id, "done")
        other = {} if live == version else {"live": live}
        self._tell_of(version, **other, **self._figures(version))
        self.prune()

    def discard_learning(self, batch_id: str) -> None:
        """Throw away everything learnt for a batch in work/, or queued/ again, its images apart."""
        work_dir = self.spool.path(batch_id)
        # The plan goes first: without it a checkpoint means nothing.
        atomic.remove_file(work_dir / PLAN_NAME)
        atomic.remove_tree(work_dir / CHECKPOINT_DIR)
        self.discard_result(batch_id)

    def discard_result(self, batch_id: str) -> None:
        """Throw away report and staged version, so that the worker makes them again from its checkpoint."""
        atomic.remove_tree(self.spool.path(batch_id) / RESULT_DIR)
        atomic.remove_tree(self.staging_dir(batch_id))

    def drop_staging(self, batch_id: str) -> None:
        """Remove a staged version that no report vouches for, and files that were being written."""
        for pattern in (f"*/{atomic.TEMPORARY_PREFIX}*", LEFTOVERS, seen.LEFTOVERS):
            for leftover in self.spool.path(batch_id).glob(pattern):
                atomic.remove_tree(leftover)
        atomic.remove_tree(self.staging_dir(batch_id))

    def prune(self) -> None:
        """Free the weights of versions that the policy no longer keeps."""
        for version in self.store.prune(self.config.store.keep_full):
            self.tell("pruned", version=version)

    def _hold(self, batch: Batch, report: Report, decision: Decision) -> None:
        work_dir = self.spool.state_dir("work") / batch.id
        atomic.write_text(work_dir / RESULT_DIR / DECISION_NAME, decision.model_dump_json(indent=2) + "\n")
        atomic.remove_tree(self.staging_dir(batch.id))
        atomic.remove_tree(work_dir / CHECKPOINT_DIR)
        if batch.attempts:
            self.spool.save(batch.with_outcome("held"))
        self.spool.move(batch.id, "held")
        why = "; ".join(rule.detail for rule in decision.rules if not rule.passed)
        self.tell("held", batch=batch.id, parent=report.parent, why=why)

    def _manifest(
        self, report: Report, decision: Decision, now: datetime, *, operator: str | None = None
    ) -> Manifest:
        given = {
            "operator": operator,
            "version": self.store.next_version(),
            "created_at": now.astimezone(UTC),
            "decision": decision,
        }
        try:
            return Manifest(**(report.manifest | given))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise WorkerError(f"the worker's report makes no manifest: {where}: {first['msg']}") from error

    def _tell_of(self, version: int, **fields: Any) -> None:
        told = publication(self.store.manifest(version))
        self.tell(told.pop("event"), **told, **fields)

    def _figures(self, version: int) -> dict[str, Any]:
        """What the event says beside its name: the batch's own exam, in a few numbers."""
        manifest = self.store.manifest(version)
        exams = (manifest.metrics or {}).get("exams")
        own = exams[0] if isinstance(exams, list) and exams else None
        if not isinstance(own, dict) or not manifest.batch or own.get("batch") != manifest.batch.id:
            return {}
        return {"exam_before": own.get("accuracy_before"), "exam_after": own.get("accuracy_after")}


def _warn(batch_id: str, sentence: str) -> None:
    logs.log("warning", level=logging.WARNING, batch=batch_id, why=sentence)


def _readable_report(work_dir: Path) -> Report | None:
    try:
        return load_report(work_dir / RESULT_DIR)
    except WorkerError:
        return None
