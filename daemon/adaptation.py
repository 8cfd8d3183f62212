"""One batch becomes a staged version and a report. Runs in the worker only.

    score the live version → adapt → prune → delta → fold → stage → exam → verify

Everything written is inside the batch's own directory or in the store's staging directory, but for what is
remembered of older exams (daemon.exam_embeddings), so a crash at any point loses nothing but time. The
decision to publish is not made here.
"""

import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from daemon.batch import Batch, read_batch
from daemon.child import Outlet, StopFlag
from daemon.config import Config
from daemon.curve import CurveWriter, Point
from daemon.errors import WorkerError
from daemon.examine import Examiner
from daemon.founding import software_versions
from daemon.general import HomeMoments, home_moments, seen_of_moments
from daemon.grading import Grading, Stopwatch
from daemon.live import Live, take_live
from daemon.plan import Plan, seed_of, settle_plan, stored_plan
from daemon.report import REPORT_NAME, RESULT_DIR, ExamResult, Report
from daemon.seen import OWN_NAME
from daemon.spool import Spool
from daemon.staging import Candidate, stage_candidate
from daemon.tasks import Order, load_task, union_of_classes
from deploy import atomic
from deploy.cpus import usable_cpus
from deploy.delta import Delta, Factor, save_delta
from deploy.errors import VerifyError
from deploy.lineage import reverted_batches
from deploy.manifest import (
    DELTA_NAME,
    WEIGHTS_NAME,
    Manifest,
    load_classes,
)
from deploy.memory import free_memory_bytes, resident_bytes
from deploy.store import VersionStore
from dynlora import settings as presets
from dynlora.clip import Clip
from dynlora.encoders import fastest_dtype
from dynlora.errors import CheckpointError, ModelError
from dynlora.learner import Adaptation, Hooks, Progress, adapt
from dynlora.memory import bound
from dynlora.task import Task

_SHARE_OF_MEMORY = 0.8  # of what is free: others grow, too


def adapt_batch(order: Order, *, outlet: Outlet, stop: StopFlag, ahead: Live | None = None) -> None:
    """Learn a batch; leave the report and the staged version.

    Args:
        ahead: a version that was opened before there was an order; it need not be the right one.

    Raises:
        Interrupted: SIGTERM came; the checkpoint resumes.
        BatchError, DeployError, DynloraError: the batch or the parent version cannot be used.
        WorkerError: the checkpoint or what was staged is damaged; the next attempt makes it again.
    """
    watch, home, config = Stopwatch(outlet), order.home, order.config
    work_dir = Spool(home).state_dir("work") / order.batch_id
    batch = read_batch(work_dir)
    store = VersionStore(home / "serving")
    parent_dir, parent_manifest = store.path(order.parent), store.manifest(order.parent)
    warnings: list[str] = []
    moments = _known_of_images(home, store, parent_manifest, config, warnings)
    wanted = _plan(batch, parent_manifest, config, moments.sha256)
    stored = _readable(stored_plan(work_dir, wanted))
    plan = stored or wanted
    torch.set_num_threads(plan.threads)
    with watch.stage("load", is_told=False):
        live = take_live(ahead, parent_dir)
        classes = union_of_classes(load_classes(parent_dir).classes, batch)
        taken_out = frozenset(reverted_batches(store))
        examiner = Examiner(home, batch, work_dir, classes, threads=plan.threads, without=taken_out)
    with ThreadPoolExecutor(1, thread_name_prefix="decode") as beside:
        decoding = beside.submit(load_task, batch, work_dir, live.loaded.preprocessing, classes)
        with watch.stage("score"):
            before = live.ask(examiner, runs_at_once=plan.threads)
        with watch.stage("decode", is_told=False):  # what scoring has left of it
            task = replace(decoding.result(), moments=moments.general, seen=moments.seen)
    with watch.stage("train"):  # with the choice of how: it takes as long as a few steps
        if stored is None:
            plan = _with_trials(plan, live.clip, task, config)
        checkpoint = settle_plan(work_dir, plan)
    with watch.stage("train"), _without_damaged(checkpoint), stop.looked_at():
        hooks = _hooks(outlet, stop, checkpoint, config.learning.checkpoint_seconds)
        hooks = _noted_for_mlflow(hooks, work_dir, config)
        adaptation = adapt(live.clip, task, _settings(plan), seed=plan.seed, hooks=hooks)
    with _making_candidate(), watch.stage("fold"):
        _leave_own_moments(adaptation, batch, work_dir)
        result_dir = work_dir / RESULT_DIR
        atomic.make_dir(result_dir)
        delta = to_delta(adaptation)
        record = save_delta(result_dir / DELTA_NAME, delta)
        candidate = Candidate(store, parent_manifest, batch, delta, record, classes)
        staged = stage_candidate(candidate, result_dir / DELTA_NAME, live=live)
    grading = Grading(store, parent_manifest, examiner, before, watch)
    with _making_candidate():
        known = {WEIGHTS_NAME: staged.weights}
        draft, exams = grading.of(staged.directory, candidate.manifest_draft, known=known)
    method = _method(plan, adaptation, watch.seconds["train"])
    draft |= {"method": method, "ranks": adaptation.ranks}
    draft |= {"delta_norm": delta.norm, "drift_norm": staged.drift}
    report = _report(draft, exams, warnings=[*warnings, *examiner.warnings], seconds=watch.seconds)
    atomic.write_text(result_dir / REPORT_NAME, report.model_dump_json(indent=2) + "\n")


def _known_of_images(
    home: Path, store: VersionStore, parent: Manifest, config: Config, warnings: list[str]
) -> HomeMoments:
    """What the home knows of images, for a preset that learns from it; adds to `warnings` what it lacks."""
    if presets.preset(config.learning.preset).objective != "default":
        return HomeMoments()
    first = store.manifest(0).files[WEIGHTS_NAME].sha256
    return home_moments(home, parent.embed_dim, of=first, warn=warnings.append)


def _leave_own_moments(adaptation: Adaptation, batch: Batch, work_dir: Path) -> None:
    """For batches to come, should this one be published: they are to leave these images to their names."""
    if (own := adaptation.own_moments) is not None:
        seen_of_moments(own, classes=len(batch.classes), batch=batch.id).save(work_dir / OWN_NAME)


@contextmanager
def _without_damaged(checkpoint: Path) -> Iterator[None]:
    """A checkpoint that cannot be resumed from goes, so that the next attempt starts over."""
    try:
        yield
    except CheckpointError as error:
        atomic.remove_file(checkpoint)
        raise WorkerError(f"{error}; it was removed, learning starts over") from error


@contextmanager
def _making_candidate() -> Iterator[None]:
    """From here on a version that cannot be used is our own new one: the parent was loaded and asked."""
    try:
        yield
    except (VerifyError, ModelError) as error:
        raise WorkerError(f"the new version cannot be used: {error}") from error


def to_delta(adaptation: Adaptation) -> Delta:
    """What was learnt, in the form that is folded and stored."""
    return Delta(
        Factor(f.key, f.row_start, f.row_stop, f.lora_B.numpy(), f.lora_A.numpy(), f.importance.numpy())
        for f in adaptation.factors
    )


def _readable(stored: Plan | None) -> Plan | None:
    """A plan whose settings this release still has: one of another release is made anew."""
    try:
        return stored if stored is None or _settings(stored) else None
    except presets.SettingsError:
        return None


def _plan(batch: Batch, parent: Manifest, config: Config, moments_sha256: str | None) -> Plan:
    weights_sha256 = parent.files[WEIGHTS_NAME].sha256
    learning = config.learning
    settings = presets.preset(learning.preset)
    settings = settings.with_overrides(rank=learning.rank or None, steps=learning.steps or None)
    return Plan(
        batch=batch.id,
        content_sha256=batch.content_sha256,
        parent=parent.version,
        parent_weights_sha256=weights_sha256,
        seed=seed_of(batch.content_sha256, weights_sha256, learning.seed),
        splits={image.sha256: image.split for image in batch.images},
        dtype="float32" if learning.dtype == "auto" else learning.dtype,
        threads=learning.threads or usable_cpus(),
        preset=learning.preset,
        settings=settings.as_dict(),
        moments_sha256=moments_sha256,
        software=software_versions(),
    )


def _with_trials(plan: Plan, clip: Clip, task: Task, config: Config) -> Plan:
    """The plan with what only trying tells: the faster dtype, and how much fits into memory at once."""
    if config.learning.dtype == "auto":
        plan = plan.model_copy(update={"dtype": fastest_dtype(clip, rank=plan.settings["rank"])})
    if config.learning.memory_bytes:
        limit = config.learning.memory_bytes - resident_bytes()
    else:
        limit = int(_SHARE_OF_MEMORY * free_memory_bytes())
    bounded = bound(clip, task, _settings(plan), limit_bytes=limit)
    update = {"images_at_once": bounded.images_at_once, "prompts_at_once": bounded.prompts_at_once}
    return plan.model_copy(update=update)


def _settings(plan: Plan) -> presets.Settings:
    chosen = ("dtype", "images_at_once", "prompts_at_once")
    return presets.Settings.from_dict(plan.settings | {name: getattr(plan, name) for name in chosen})


def _hooks(outlet: Outlet, stop: StopFlag, checkpoint: Path, checkpoint_seconds: float) -> Hooks:
    """Progress out, stop requests in, a checkpoint every so often. No clock reaches what is learnt.

    The last step is always saved: what comes after it can then be made again without learning again.
    """
    last_saved = time.monotonic()
    is_last = False
    first: tuple[int, float] | None = None  # step and time; what came before it says nothing of the rest

    def on_progress(progress: Progress) -> None:
        nonlocal first, is_last
        is_last = progress.step == progress.steps
        now = time.monotonic()
        first = first or (progress.step, now)
        done = progress.step - first[0]
        left = (now - first[1]) / done * (progress.steps - progress.step) if done else None
        outlet.step(
            step=progress.step,
            steps=progress.steps,
            loss=round(progress.loss, 4),
            kept_rank=round(progress.kept_rank, 2),
            eta_seconds=None if left is None else round(left, 1),
            **({"resumed_at": first[0] - 1} if first[0] > 1 else {}),
        )

    def should_save() -> bool:
        return is_last or time.monotonic() - last_saved >= checkpoint_seconds

    def save(content: bytes) -> None:
        nonlocal last_saved
        atomic.write_file(checkpoint, content)
        last_saved = time.monotonic()

    resume_from = checkpoint.read_bytes() if checkpoint.exists() else None
    return Hooks(on_progress, lambda: stop.is_set, should_save, save, resume_from)


def _noted_for_mlflow(hooks: Hooks, work_dir: Path, config: Config) -> Hooks:
    """The same hooks; where MLflow is told of batches, every step is written down, too."""
    if not config.mlflow.tracking_uri:
        return hooks
    curve = CurveWriter(work_dir, is_new=hooks.resume_from is None)

    def on_progress(progress: Progress) -> None:
        curve.add(Point(progress.step, progress.loss, progress.kept_rank, time.time()))
        hooks.on_progress(progress)

    return replace(hooks, on_progress=on_progress)


def _report(
    draft: dict[str, Any], exams: list[ExamResult], *, warnings: list[str], seconds: dict[str, float]
) -> Report:
    return Report(
        batch=draft["batch"]["id"],
        parent=draft["parent"],
        manifest=draft,
        exams=tuple(exams),
        warnings=tuple(warnings),
        seconds=seconds,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _method(plan: Plan, adaptation: Adaptation, seconds: float) -> dict[str, object]:
    """`seconds` of training in this process: after a resume, of what was left to do."""
    return {
        "preset": plan.preset,
        "settings": plan.settings,
        "seed": plan.seed,
        "steps": adaptation.steps,
        "final_loss": adaptation.loss,
        "tokens": adaptation.tokens,
        "moments_sha256": plan.moments_sha256,
        "scale": adaptation.scale,
        "dtype": plan.dtype,
        "images_at_once": plan.images_at_once,
        "prompts_at_once": plan.prompts_at_once,
        "threads": plan.threads,
        "seconds": seconds,
    }
