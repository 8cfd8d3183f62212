"""A version without one of its batches, or with one that was held: staged, graded, reported. Worker only.

    revert     W0 → fold of the lineage without the batch → stage → verify → exam
    promote    live weights → the held delta on top → stage → verify → exam

The weights come from the one fold; torch only computes what lies beside them (class embeddings, and the
reference outputs that parity is checked against: computed by ONNX Runtime they would prove nothing).
Nothing outside the store's staging directory is written, but for what is remembered of exams
(daemon.exam_embeddings). The decision to publish is not made here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon.batch import read_batch
from daemon.child import Outlet
from daemon.config import Config
from daemon.errors import WorkerError
from daemon.examine import Examiner, Grades
from daemon.grading import Grading, Stopwatch
from daemon.live import Live, fitting_live
from daemon.report import RESULT_DIR, Report, load_report, staging_name
from daemon.spool import Spool
from daemon.staging import Candidate, Staged, inherited, stage_candidate, write_beside_weights
from daemon.tasks import Order, union_of_classes
from deploy.cpus import usable_cpus
from deploy.delta import load_delta
from deploy.lineage import (
    batch_infos,
    classes_without,
    fold_lineage,
    lineage_without,
    reverted_batches,
)
from deploy.manifest import (
    DELTA_NAME,
    WEIGHTS_NAME,
    ClassEntry,
    Manifest,
    file_record,
    load_classes,
)
from deploy.store import VersionStore


@dataclass(frozen=True)
class Ground:
    """What both start from.

    Attributes:
        live: the live version, if it was opened ahead.
    """

    home: Path
    batch_id: str
    store: VersionStore
    parent: Manifest
    config: Config
    watch: Stopwatch
    live: Live | None

    @property
    def parent_dir(self) -> Path:
        """The live version's directory."""
        return self.store.path(self.parent.version)

    @property
    def parent_classes(self) -> tuple[ClassEntry, ...]:
        """The live version's classes."""
        return load_classes(self.parent_dir).classes

    @property
    def threads(self) -> int:
        """Of ONNX Runtime."""
        return self.config.learning.threads or usable_cpus()


def revise(command: str, order: Order, *, outlet: Outlet, ahead: Live | None = None) -> Report:
    """Stage the live version without the order's batch (command revert), or with it (promote).

    Args:
        ahead: a version that was opened before there was an order; it need not be the right one.

    Raises:
        DeployError, DaemonError: a version, a delta or the batch cannot be used; says which and what to do.
    """
    home, store = order.home, VersionStore(order.home / "serving")
    parent = store.manifest(order.parent)
    live = fitting_live(ahead, store.path(order.parent))
    ground = Ground(home, order.batch_id, store, parent, order.config, Stopwatch(outlet), live)
    return _promote(ground) if command == "promote" else _revert(ground, outlet)


def _ask_live(ground: Ground, examiner: Examiner, classes: Sequence[ClassEntry] | None = None) -> Grades:
    if ground.live is None:
        return examiner.grade(ground.parent_dir, classes)
    return ground.live.ask(examiner, classes, runs_at_once=ground.threads)


def _revert(ground: Ground, outlet: Outlet) -> Report:
    store, parent, watch = ground.store, ground.parent, ground.watch
    lineage = lineage_without(parent, ground.batch_id)
    infos = batch_infos(store, parent.lineage)
    classes = classes_without(store, parent, ground.batch_id)
    without = frozenset({ground.batch_id, *reverted_batches(store)})
    # Each version among its own names, as clients ask it: the name that goes did harm too.
    examiner = Examiner(ground.home, None, ground.home, classes, threads=ground.threads, without=without)
    with watch.stage("score"):
        before = _ask_live(ground, examiner, ground.parent_classes)
    with watch.stage("fold"):
        staging = store.stage(staging_name("revert", ground.batch_id), like=parent.version)
        weights = fold_lineage(store, parent.version, lineage, staging / WEIGHTS_NAME, told=outlet.tensors)
        drift = write_beside_weights(staging, store, parent, classes, live=ground.live)
    draft = {
        "kind": "revert",
        "batch": infos[ground.batch_id].model_dump(),
        "lineage": [entry.model_dump() for entry in lineage],
    }
    grading = Grading(store, parent, examiner, before, watch)
    return _finish(ground, grading, Staged(staging, weights, drift), draft)


def _promote(ground: Ground) -> Report:
    store, parent, watch = ground.store, ground.parent, ground.watch
    held_dir = Spool(ground.home).state_dir("held") / ground.batch_id
    batch, held = read_batch(held_dir), load_report(held_dir / RESULT_DIR)
    delta_path = held_dir / RESULT_DIR / DELTA_NAME
    record = file_record(delta_path) if delta_path.is_file() else None
    expected = held.manifest["lineage"][-1]["delta_sha256"]
    if record is None or record.sha256 != expected:
        found = record.sha256 if record else "no file"
        raise WorkerError(
            f"{delta_path} is not what the report records: expected sha256 {expected}, found {found}; "
            "drop the images again"
        )
    classes = union_of_classes(ground.parent_classes, batch)
    examiner = Examiner(
        ground.home,
        # Without images its own exam is empty, but stays the first: the gate looks for it there.
        batch if batch.forgotten is None else batch.model_copy(update={"images": []}),
        held_dir,
        classes,
        threads=ground.threads,
        without=frozenset(reverted_batches(store)),
    )
    with watch.stage("score"):
        before = _ask_live(ground, examiner)
    with watch.stage("fold"):
        delta = load_delta(delta_path)
        candidate = Candidate(store, parent, batch, delta, record, classes)
        name = staging_name("promote", ground.batch_id)
        staged = stage_candidate(candidate, delta_path, live=ground.live, name=name)
    draft = candidate.manifest_draft({}) | {
        "kind": "promote",
        "method": held.manifest.get("method"),
        "ranks": held.manifest.get("ranks"),
        "delta_norm": delta.norm,
    }
    return _finish(ground, Grading(store, parent, examiner, before, watch), staged, draft)


def _finish(ground: Ground, grading: Grading, staged: Staged, draft: dict[str, Any]) -> Report:
    """Verify and grade what was staged."""
    parent, watch = ground.parent, ground.watch
    known = {WEIGHTS_NAME: staged.weights}
    begun = draft | {"drift_norm": staged.drift}
    draft, exams = grading.of(staged.directory, lambda files: begun | inherited(parent, files), known=known)
    return Report(
        batch=ground.batch_id,
        parent=parent.version,
        manifest=draft,
        exams=tuple(exams),
        warnings=tuple(grading.examiner.warnings),
        seconds=watch.seconds,
    )
