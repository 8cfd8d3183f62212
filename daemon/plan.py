"""What a worker fsyncs before its first step, and obeys when it resumes: same plan, same weights.

Knows nothing of models: settings are carried as plain values.
"""

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deploy import atomic

PLAN_NAME = "plan.json"
CHECKPOINT_DIR = "checkpoint"
CHECKPOINT_NAME = "checkpoint.safetensors"


class Plan(BaseModel):
    """Everything the learnt weights depend on. Clocks are not among it."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_number: Literal[1] = Field(default=1, alias="schema")
    batch: str
    content_sha256: str
    parent: int
    parent_weights_sha256: str
    seed: int
    splits: dict[str, Literal["train", "tune", "exam"]]  # image sha256 → split
    dtype: Literal["float32"] = "float32"
    threads: int  # torch's; another number may round differently
    preset: str
    settings: dict[str, Any]
    software: dict[str, str]


def seed_of(content_sha256: str, parent_weights_sha256: str, salt: int = 0) -> int:
    """A seed that the batch, what it is learnt on top of, and the configured `salt` decide; below 2^63."""
    digest = hashlib.sha256(f"{content_sha256} {parent_weights_sha256} {salt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def settle_plan(work_dir: Path, wanted: Plan) -> tuple[Plan, Path]:
    """The plan to follow and where its checkpoint lies.

    A stored plan for the same batch, parent and software is obeyed, also where the configuration has changed
    since. Any other is dropped with its checkpoint, and `wanted` is stored in its place.
    """
    path, checkpoint = work_dir / PLAN_NAME, work_dir / CHECKPOINT_DIR / CHECKPOINT_NAME
    stored = _read(path)
    if stored is not None and _anchor(stored) == _anchor(wanted):
        atomic.make_dir(checkpoint.parent)
        return stored, checkpoint
    atomic.remove_tree(checkpoint.parent)
    atomic.make_dir(checkpoint.parent)
    atomic.write_text(path, wanted.model_dump_json(by_alias=True, indent=2) + "\n")
    return wanted, checkpoint


def _anchor(plan: Plan) -> tuple[object, ...]:
    return plan.batch, plan.content_sha256, plan.parent_weights_sha256, plan.splits, plan.software


def _read(path: Path) -> Plan | None:
    """The stored plan; None where there is none, or one that another release wrote."""
    try:
        return Plan.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
