"""Which batches are still to be logged to MLflow: a note for each in `to_mlflow/` of the home.

A note is written once the batch is decided and removed once its run is whole, so neither a server that is
down for a week nor a restart of the daemon loses a run.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from daemon.batch import sequence
from daemon.config import MlflowConfig
from deploy import atomic

NOTES_DIR = "to_mlflow"
DECISIONS = ("published", "held", "failed", "promoted")
_SUFFIX = ".json"


class Note(BaseModel):
    """What the event said that ended a batch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: str
    decision: str  # the event's name
    at: str  # UTC, ISO 8601
    version: int | None = None
    why: str | None = None


def note_of(config: MlflowConfig, event: str, fields: Mapping[str, Any]) -> Note | None:
    """What is to be noted of an event; None where it ends no batch or nothing is to be logged."""
    if event not in DECISIONS or not config.tracking_uri or not fields.get("batch"):
        return None
    moment: datetime = fields.get("at") or datetime.now(UTC)
    return Note(
        batch=str(fields["batch"]),
        decision=event,
        at=moment.isoformat(timespec="milliseconds"),
        version=fields.get("version"),
        why=fields.get("why"),
    )


def write_note(home: Path, note: Note) -> None:
    """Keep a note durably; a later one about the same batch replaces it.

    Raises:
        OSError: the disk is full, say.
    """
    atomic.make_dir(home / NOTES_DIR)
    atomic.write_text(home / NOTES_DIR / f"{note.batch}{_SUFFIX}", note.model_dump_json() + "\n")


def noted(home: Path) -> list[str]:
    """The batches with a note, in working order."""
    try:
        names = [path.stem for path in (home / NOTES_DIR).iterdir() if path.suffix == _SUFFIX]
    except FileNotFoundError:
        return []
    found = [(number, name) for name in names if (number := sequence(name)) is not None]
    return [name for _, name in sorted(found)]


def read_note(home: Path, batch_id: str) -> Note | None:
    """One note; None where it is gone or damaged."""
    try:
        return Note.model_validate_json((home / NOTES_DIR / f"{batch_id}{_SUFFIX}").read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def remove_note(home: Path, batch_id: str) -> None:
    """The batch needs no run any more."""
    atomic.remove_file(home / NOTES_DIR / f"{batch_id}{_SUFFIX}")
