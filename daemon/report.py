"""What a worker hands over: the report of one adaptation (`report.json`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from daemon.errors import WorkerError
from deploy.manifest import Manifest

RESULT_DIR = "result"  # in the batch's directory
REPORT_NAME = "report.json"
DECISION_NAME = "decision.json"


class ExamResult(BaseModel):
    """One batch's exam, graded before and after over the union of all known class names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: str
    images: NonNegativeInt
    correct_before: NonNegativeInt
    correct_after: NonNegativeInt
    gained: NonNegativeInt = Field(description="images wrong before and right after")
    lost: NonNegativeInt = Field(description="images right before and wrong after")

    @model_validator(mode="after")
    def _adds_up(self) -> "ExamResult":
        if self.correct_after - self.correct_before != self.gained - self.lost:
            raise ValueError(
                f"exam of {self.batch}: {self.correct_before} right before and {self.correct_after} after, "
                f"but {self.gained} gained and {self.lost} lost"
            )
        if max(self.correct_before, self.correct_after) > self.images:
            raise ValueError(f"exam of {self.batch}: more images right than the {self.images} there are")
        return self


class Report(BaseModel):
    """The result of one adaptation, promotion or revert.

    `exams` starts with the exam of the batch itself; the exams of the batches kept before it follow. A revert
    has only those of the batches that stay.
    `manifest` holds every field of the version's manifest but version, created_at, operator and decision,
    which are the daemon's to give.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: str
    parent: NonNegativeInt
    manifest: dict[str, Any]
    exams: tuple[ExamResult, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: dict[str, float] = {}
    peak_memory_bytes: int | None = None


def staging_name(command: str, batch: str) -> str:
    """The name that the worker stages a promotion or a revert under."""
    return f"{command}-{batch}"


def metrics_of(exams: Sequence[ExamResult], cosines: Mapping[str, float | None]) -> dict[str, Any]:
    """What a manifest records of the exams and of how far the embeddings moved."""

    def row(exam: ExamResult) -> dict[str, Any]:
        return {
            "batch": exam.batch,
            "images": exam.images,
            "accuracy_before": exam.correct_before / exam.images,
            "accuracy_after": exam.correct_after / exam.images,
            "negative_flips": exam.lost,
        }

    images = sum(exam.images for exam in exams)
    return {
        "exams": [row(exam) for exam in exams if exam.images],
        "negative_flip_rate": sum(exam.lost for exam in exams) / images if images else None,
        **cosines,
    }


def load_report(result_dir: Path) -> Report:
    """Read `report.json` of a finished worker.

    Raises:
        WorkerError: the file is missing, cut short or does not follow the protocol.
    """
    path = result_dir / REPORT_NAME
    try:
        return Report.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise WorkerError(f"the worker left no report: expected {path}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise WorkerError(f"{path} is not a worker's report: {where}: {first['msg']}") from error


def exam_rows(manifest: Manifest) -> list[Mapping[str, Any]]:
    """The exams that a version was graded on, its own batch's first; none where it was not graded."""
    rows = (manifest.metrics or {}).get("exams")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
