"""What MLflow is told of one batch, read from the home's files: parameters, figures, the course of training.

Names and numbers only: no image, no weight, no file's name. Knows nothing of MLflow but its limits.
"""

import hashlib
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version as release_of
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from daemon.batch import Batch
from daemon.curve import Point, read_curve
from daemon.errors import BatchError, WorkerError
from daemon.plan import Plan, read_plan
from daemon.report import DECISION_NAME, RESULT_DIR, Report, load_report
from daemon.run_notes import Note
from daemon.spool import Spool
from deploy.errors import DeployError
from deploy.manifest import GRAPH_NAMES, WEIGHTS_NAME, Decision
from deploy.store_reader import StoreReader

LONGEST = 500  # characters of a value, which servers of all ages take
DECIDED_AT = "dynlora.decided_at"
_KEY = "dynlora.key"
_FIGURES = ("negative_flip_rate", "mean_image_cosine", "mean_text_cosine")
_NORMS = ("delta_norm", "drift_norm")
_TOWERS = ("vision", "text")


@dataclass(frozen=True)
class RunRecord:
    """One run. Times in seconds since the epoch."""

    name: str
    started_at: float
    ended_at: float
    has_failed: bool
    params: dict[str, str]
    tags: dict[str, str]
    figures: dict[str, float]  # known at the end
    curve: list[Point] = field(default_factory=list)

    def goes_on_from(self, tags: Mapping[str, str]) -> bool:
        """Whether this is the decision that a run with these tags tells of, or a promotion of that batch.

        After a retry it is not: then another update was learnt.
        """
        return self.tags["dynlora.decision"] == "promoted" or tags.get(DECIDED_AT) == self.tags[DECIDED_AT]

    @property
    def identity(self) -> dict[str, str]:
        """The tag that no other batch has, wherever its home may be moved."""
        return {_KEY: self.tags[_KEY]}


def gather_run(home: Path, note: Note) -> RunRecord | None:
    """Read everything there is about a batch that was decided; None where the batch is gone."""
    spool = Spool(home)
    try:
        directory = spool.path(note.batch)
    except BatchError:
        return None
    batch, plan, report = _batch(spool, note.batch), read_plan(directory), _report(directory)
    draft = _manifest(home, note, report)
    ended_at = datetime.fromisoformat(note.at).timestamp()
    curve = read_curve(directory)
    started_at = _started_at(batch, ended_at)
    return RunRecord(
        name=note.batch,
        started_at=started_at,
        ended_at=ended_at,
        has_failed=note.decision == "failed",
        params=_cut(_params(note, batch, plan, draft)),
        tags=_cut(_tags(home, note, directory, draft) | _content(note, batch)),
        figures=_figures(draft) | _times(batch, report, ended_at, is_live=note.version is not None),
        curve=curve,
    )


def _batch(spool: Spool, batch_id: str) -> Batch | None:
    try:
        return spool.load(batch_id)
    except BatchError:  # refused before it had a record
        return None


def _report(directory: Path) -> Report | None:
    try:
        return load_report(directory / RESULT_DIR)
    except WorkerError:
        return None


def _manifest(home: Path, note: Note, report: Report | None) -> dict[str, Any]:
    """What the version's manifest says; of a batch without a version, the worker's draft of it."""
    if note.version is not None:
        try:
            return StoreReader(home / "serving").manifest(note.version).model_dump(mode="json")
        except DeployError:  # damaged since, which `verify` tells
            pass
    return report.manifest if report is not None else {}


def _started_at(batch: Batch | None, ended_at: float) -> float:
    if batch is None:
        return ended_at
    first = batch.attempts[0].started_at if batch.attempts else batch.received_at
    return min(ended_at, datetime.fromisoformat(first).timestamp())


def _params(note: Note, batch: Batch | None, plan: Plan | None, draft: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"batch": note.batch, "version": note.version, "parent": draft.get("parent")}
    if batch is not None:
        names = [entry.name for entry in batch.classes]
        found |= {"classes": len(names), "class_names": _listed(names)}
        found |= {f"images.{split}": batch.count(split) for split in ("train", "tune", "exam")}
    if plan is not None:
        found |= {"preset": plan.preset, "seed": plan.seed, "dtype": plan.dtype, "threads": plan.threads}
        found |= {
            "image_moments": plan.moments_sha256,
            "images_at_once": plan.images_at_once,
            "prompts_at_once": plan.prompts_at_once,
        }
        # A preset leaves open what the plan chooses: the same names are in both.
        found |= {f"settings.{key}": value for key, value in plan.settings.items() if key not in found}
        found |= {f"software.{key}": value for key, value in plan.software.items()}
    return found


def _tags(home: Path, note: Note, directory: Path, draft: Mapping[str, Any]) -> dict[str, Any]:
    files = draft.get("files") or {}
    sha256 = {Path(name).stem: (files.get(name) or {}).get("sha256") for name in (*GRAPH_NAMES, WEIGHTS_NAME)}
    return {
        "mlflow.source.name": "dynlora",
        "dynlora.release": release_of("dynlora"),
        "dynlora.home": f"{socket.gethostname()}:{home.absolute()}",
        "dynlora.batch": note.batch,
        "dynlora.decision": note.decision,
        DECIDED_AT: note.at,
        "dynlora.reason": note.why or _rules(directory, draft),
        "dynlora.version": note.version,
        **{f"dynlora.{name}.sha256": value for name, value in sha256.items()},
    }


def _content(note: Note, batch: Batch | None) -> dict[str, Any]:
    if batch is None:
        return {_KEY: _sha256(note.batch, note.at)}
    key = _sha256(batch.id, batch.received_at, batch.content_sha256)
    return {_KEY: key, "dynlora.content.sha256": batch.content_sha256}


def _sha256(*words: str) -> str:
    return hashlib.sha256(" ".join(words).encode()).hexdigest()


def _rules(directory: Path, draft: Mapping[str, Any]) -> str | None:
    """The gate's sentences, rule by rule."""
    try:
        if draft.get("decision"):
            decision = Decision.model_validate(draft["decision"])
        else:
            decision = Decision.model_validate_json((directory / RESULT_DIR / DECISION_NAME).read_bytes())
    except (OSError, ValidationError):
        return None
    return "; ".join(rule.detail for rule in decision.rules)


def _figures(draft: Mapping[str, Any]) -> dict[str, float]:
    metrics, method = draft.get("metrics") or {}, draft.get("method") or {}
    found = {key: draft.get(key) for key in _NORMS} | {key: metrics.get(key) for key in _FIGURES}
    found |= {key: method.get(key) for key in ("final_loss", "scale", "tokens")}
    ranks = draft.get("ranks") or {}
    for tower in _TOWERS:
        kept = [rank for key, rank in ranks.items() if key.startswith(f"{tower}.")]
        if kept:
            found[f"rank.{tower}"] = sum(kept)
    own = (draft.get("batch") or {}).get("id")
    rows = [row for row in metrics.get("exams") or [] if isinstance(row, dict)]
    for probe, of_probe in (
        ("new", [row for row in rows if row["batch"] == own]),
        ("old", [row for row in rows if row["batch"] != own]),
    ):
        found |= _accuracies(probe, of_probe)
    return {key: float(value) for key, value in found.items() if isinstance(value, int | float)}


def _accuracies(probe: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Pooled over the exams of the batch itself (new), or of those before it (old)."""
    images = sum(row["images"] for row in rows)
    if not images:
        return {}
    found = {f"exam.{probe}.images": float(images)}
    for when in ("before", "after"):
        right = sum(row[f"accuracy_{when}"] * row["images"] for row in rows)
        found[f"exam.{probe}.accuracy_{when}"] = right / images
    return found | {f"exam.{probe}.lost": float(sum(row["negative_flips"] for row in rows))}


def _times(batch: Batch | None, report: Report | None, ended_at: float, *, is_live: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    if batch is not None:
        found["attempts"] = float(len(batch.attempts))
        if is_live:
            found["seconds.drop_to_live"] = ended_at - datetime.fromisoformat(batch.received_at).timestamp()
    if report is not None:
        found |= {f"seconds.{stage}": float(seconds) for stage, seconds in report.seconds.items()}
        if report.peak_memory_bytes is not None:
            found["peak_memory_bytes"] = float(report.peak_memory_bytes)
    return found


def _listed(names: Sequence[str]) -> str:
    """As many names as fit, and how many more there are."""
    shown = ", ".join(names)
    count = len(names)
    while len(shown) > LONGEST and count:
        count -= max(1, count // 10)
        shown = ", ".join(names[:count]) + f" and {len(names) - count} more"
    return shown


def _cut(values: Mapping[str, Any]) -> dict[str, str]:
    """As text, without what is not known."""
    shown = {key: str(value) for key, value in values.items() if value not in (None, "")}
    return {key: text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…" for key, text in shown.items()}
