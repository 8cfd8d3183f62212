"""The daemon's Prometheus metrics: what they are called and where their numbers come from.

Labels have few values each: outcomes, stages, states; never a batch or a class. Counters begin anew with the
daemon, as counters may; what must survive a restart (the last success, the accuracy of the live version) is
read from the files.
"""

import os
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from daemon.errors import WorkerError
from daemon.report import RESULT_DIR, exam_rows, load_report
from daemon.spool import STATES, Spool
from deploy.errors import DeployError
from deploy.manifest import Manifest
from deploy.store import VersionStore

OUTCOMES = ("published", "held", "failed", "duplicate")
DAEMON_STATES = ("idle", "working", "waiting", "pinned", "paused", "resting")
_AFTER_TRAINING = ("fold", "verify", "exam")
STAGES = ("load", "score", "train", "fold", "verify", "exam")
_STAGE_BUCKETS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14_400)
_LIFE_BUCKETS = (10, 30, 60, 120, 300, 900, 3600, 14_400, 86_400, 604_800)  # seconds; up to a week
_TOWERS = {"vision": "vision.", "text": "text."}


class Metrics:
    """Counts what is told, shows what is; `text` is what a scrape gets."""

    def __init__(self, spool: Spool, store: VersionStore, release: str) -> None:
        self._spool, self._store = spool, store
        self._shown: int | None = None  # the version whose figures the gauges show
        self._step: tuple[object, int, int] = (
            None,
            0,
            0,
        )  # the batch at work, its step, of how many
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series each, which nobody wants
        self._gauge("build_info", "The release of dynlora.", "release").labels(release).set(1)
        self._define_state()
        self._define_work()
        self._define_version()
        for outcome in OUTCOMES:
            self._batches.labels(outcome)  # a counter that is absent cannot be seen to rise
        for stage in STAGES:
            self._stages.labels(stage)
        for outcome in ("done", "failed"):
            self._hooks.labels(outcome)

    def _gauge(self, name: str, words: str, *labels: str) -> Gauge:
        return Gauge(f"dynlora_{name}", words, labels, registry=self.registry)

    def _define_state(self) -> None:
        self._state = self._gauge("daemon_state", "1 for what the daemon is doing, 0 for the rest.", "state")
        self._seen = self._gauge("daemon_last_round_timestamp_seconds", "When the loop last came round.")
        self._in_trouble = self._gauge("daemon_trouble", "1 while something does not go on; see the status.")
        self._problems = self._gauge("inbox_problems", "Sentences about what lies in the inbox unused.")
        self._queue = self._gauge("inbox_batches", "Batches by the state of the spool they are in.", "state")
        self._oldest = self._gauge(
            "inbox_oldest_age_seconds", "How long the oldest drop waits that is not learnt yet; 0: none."
        )
        self._free = self._gauge("disk_free_bytes", "Free space on the home's file system.")
        self._needed = self._gauge(
            "disk_needed_bytes", "What must be free for a batch to be learnt, disk.reserve_bytes included."
        )
        self._size = self._gauge("disk_size_bytes", "Size of the home's file system.")
        self._runs = self._gauge(
            "mlflow_waiting_batches",
            "Batches that were decided and have no run in MLflow yet; 0: it gets none.",
        )

    def _define_work(self) -> None:
        words = "Batches that were finished, by outcome."
        self._batches = Counter("dynlora_batches", words, ["outcome"], registry=self.registry)
        self._attempts = Counter("dynlora_attempts", "Tries at learning a batch.", registry=self.registry)
        self._failures = Counter(
            "dynlora_attempts_failed", "Tries that failed and are made again.", registry=self.registry
        )
        words = "Hooks that were called, by outcome."
        self._hooks = Counter("dynlora_hooks", words, ["outcome"], registry=self.registry)
        self._steps = Counter("dynlora_train_steps", "Training steps.", registry=self.registry)
        self._stages = Histogram(
            "dynlora_stage_duration_seconds",
            "Time of finished batches by stage.",
            ["stage"],
            buckets=_STAGE_BUCKETS,
            registry=self.registry,
        )
        self._life = Histogram(
            "dynlora_drop_to_live_seconds",
            "From taking a batch in to its version being live.",
            buckets=_LIFE_BUCKETS,
            registry=self.registry,
        )
        self._progress = self._gauge("train_progress_ratio", "How far the batch at work is; 0: none is.")
        self._loss = self._gauge("train_loss", "Loss of the last step of the batch at work.")
        self._left = self._gauge("train_eta_seconds", "Time that training still takes; 0: none is under way.")

    def _define_version(self) -> None:
        self._live = self._gauge("live_version", "Number of the version that is live; -1: none is.")
        self._success = self._gauge(
            "last_success_timestamp_seconds", "When a batch was last published; 0: never."
        )
        self._accuracy = self._gauge(
            "eval_accuracy_ratio",
            "Exams of the live version: its own batch (new) and earlier ones (old), pooled.",
            "probe",
            "when",
        )
        self._flips = self._gauge("negative_flip_ratio", "Exam images it lost, of all of them.")
        self._drift = self._gauge("drift_norm", "Distance of the live weights from version 0.")
        self._delta = self._gauge("delta_norm", "Size of the live version's update.")
        self._rank = self._gauge("rank_active", "Sum of the ranks its update kept, by tower.", "tower")
        self._cosine = self._gauge(
            "embedding_cosine", "Mean cosine between its embeddings and its parent's, by tower.", "tower"
        )

    def told(self, event: str, fields: Mapping[str, Any]) -> None:
        """Count an event, after its effect is on disk."""
        if event in OUTCOMES:
            self._batches.labels(event).inc()
        if event == "adapting":
            self._attempts.inc()
        if event in ("hook_done", "hook_failed"):
            self._hooks.labels(event.removeprefix("hook_")).inc()
        if event == "attempt_failed":
            self._failures.inc()
        if event in ("published", "held"):
            self._time(str(fields.get("batch")), is_live=event == "published")

    def _time(self, batch_id: str, *, is_live: bool) -> None:
        """Observe how long the stages of a finished batch took."""
        try:
            report = load_report(self._spool.path(batch_id) / RESULT_DIR)
            received_at = datetime.fromisoformat(self._spool.load(batch_id).received_at)
        except (DeployError, WorkerError, OSError, ValueError):
            return  # a batch that was forgotten meanwhile, say: its times are no longer known
        for stage in STAGES:
            if (seconds := report.seconds.get(stage)) is not None:
                self._stages.labels(stage).observe(seconds)
        if is_live:
            self._life.observe(max(0.0, (datetime.now(received_at.tzinfo) - received_at).total_seconds()))

    def show(self, content: Mapping[str, Any], now: float) -> None:
        """Take over what status.json says and `mlflow_waiting`; `now` in seconds since the epoch.

        Raises:
            OSError: the home cannot be read.
            DeployError: the version store cannot.
        """
        for state in DAEMON_STATES:
            self._state.labels(state).set(state == content["state"])
        self._seen.set(now)
        self._in_trouble.set(content["trouble"] is not None)
        self._problems.set(len(content["inbox"]))
        oldest_at = content.get("oldest_at")
        self._oldest.set(0 if oldest_at is None else max(0.0, now - oldest_at))
        self._runs.set(content["mlflow_waiting"])
        self._show_work(content["working"] or {})
        for state in STATES:
            self._queue.labels(state).set(len(self._spool.ids(state)))
        disk = os.statvfs(self._spool.root)
        self._free.set(disk.f_bavail * disk.f_frsize)
        self._size.set(disk.f_blocks * disk.f_frsize)
        self._needed.set(content.get("disk_needed_bytes") or 0)
        live = content["live"]
        self._live.set(-1 if live is None else live)
        if live is not None and live != self._shown:
            self._show_version(self._store.manifest(live))
            self._success.set(self._last_success())
            self._shown = live

    def count_steps(self, working: Mapping[str, Any]) -> None:
        """Count the training steps that were made since the last call, those of a phase that is over too.

        A worker that goes on from a checkpoint begins to count at the step it resumed at.
        """
        is_training = working.get("phase") == "train" and "step" in working
        batch, before, steps = self._step
        now = working["step"] if is_training else 0
        self._step = (working.get("batch"), now, working.get("steps", 0) if is_training else 0)
        if batch != self._step[0]:
            return
        if not is_training and working.get("phase") in _AFTER_TRAINING:
            now = steps  # 0 unless it was training when last seen
        before = max(before, working.get("resumed_at", 0) if is_training else 0)
        if now > before:
            self._steps.inc(now - before)

    def _show_work(self, working: Mapping[str, Any]) -> None:
        is_training = working.get("phase") == "train" and working.get("steps")
        self._progress.set(working.get("step", 0) / working["steps"] if is_training else 0)
        self._loss.set(working.get("loss") or 0 if is_training else 0)
        self._left.set(working.get("eta_seconds") or 0 if is_training else 0)

    def _show_version(self, manifest: Manifest) -> None:
        metrics: dict[str, Any] = manifest.metrics or {}
        self._accuracy.clear()
        for probe, rows in _probes(manifest).items():
            images = sum(row["images"] for row in rows)
            for when in ("before", "after") if images else ():
                right = sum(row[f"accuracy_{when}"] * row["images"] for row in rows)
                self._accuracy.labels(probe, when).set(right / images)
        self._flips.set(metrics.get("negative_flip_rate") or 0)
        self._drift.set(manifest.drift_norm or 0)
        self._delta.set(manifest.delta_norm or 0)
        ranks = manifest.ranks or {}
        for tower, prefix in _TOWERS.items():
            self._rank.labels(tower).set(sum(rank for key, rank in ranks.items() if key.startswith(prefix)))
        self._cosine.clear()
        for tower, key in (("vision", "mean_image_cosine"), ("text", "mean_text_cosine")):
            if metrics.get(key) is not None:
                self._cosine.labels(tower).set(metrics[key])

    def _last_success(self) -> float:
        moments = [
            summary.created_at.timestamp()
            for summary in map(self._store.summary, self._store.versions())
            if summary.kind in ("update", "promote")
        ]
        return max(moments, default=0.0)

    def text(self) -> bytes:
        """Return all of it in the text format of Prometheus."""
        return generate_latest(self.registry)


def _probes(manifest: Manifest) -> dict[str, list[Mapping[str, Any]]]:
    """The exam rows of the version's own batch, and those of the batches before it."""
    rows = exam_rows(manifest)
    own = manifest.batch.id if manifest.batch else None
    return {
        "new": [row for row in rows if row["batch"] == own],
        "old": [row for row in rows if row["batch"] != own],
    }
