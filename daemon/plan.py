"""What a worker fsyncs before its first step, and obeys when it resumes: same plan, same weights.

Knows nothing of models: settings are carried as plain values.
"""

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deploy import atomic
from deploy.errors import WeightsError
from deploy.weights import read_metadata

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
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the towers while learning
    images_at_once: int | None = None  # memory bounds what is computed at once; None: all of a step
    prompts_at_once: int | None = None
    threads: int  # torch's; another number may round differently
    preset: str
    settings: dict[str, Any]
    moments_sha256: str | None = None  # of the home's image moments: what is learnt depends on them
    software: dict[str, str]


def seed_of(content_sha256: str, parent_weights_sha256: str, salt: int = 0) -> int:
    """A seed that the batch, what it is learnt on top of, and the configured `salt` decide; below 2^63."""
    digest = hashlib.sha256(f"{content_sha256} {parent_weights_sha256} {salt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stored_plan(work_dir: Path, wanted: Plan) -> Plan | None:
    """The plan that an earlier attempt settled on; None where there is none that fits.

    One for the same batch, parent and software is obeyed, also where the configuration has changed since.
    """
    stored = read_plan(work_dir)
    return stored if stored is not None and _anchor(stored) == _anchor(wanted) else None


def settle_plan(work_dir: Path, plan: Plan) -> Path:
    """Make `plan` the one to follow; returns where its checkpoint lies. That of any other plan is dropped."""
    checkpoint = work_dir / CHECKPOINT_DIR / CHECKPOINT_NAME
    if read_plan(work_dir) != plan:
        atomic.remove_tree(checkpoint.parent)
        atomic.write_text(work_dir / PLAN_NAME, plan.model_dump_json(by_alias=True, indent=2) + "\n")
    atomic.make_dir(checkpoint.parent)
    return checkpoint


def step_reached(work_dir: Path) -> int:
    """The step at which the checkpoint goes on; 0 without one that can be read."""
    try:
        return int(read_metadata(work_dir / CHECKPOINT_DIR / CHECKPOINT_NAME).get("step", 0))
    except (WeightsError, ValueError):
        return 0


def _anchor(plan: Plan) -> tuple[object, ...]:
    inputs = plan.content_sha256, plan.parent_weights_sha256, plan.moments_sha256
    return plan.batch, *inputs, plan.splits, plan.software


def read_plan(work_dir: Path) -> Plan | None:
    """The plan of a batch; None where there is none, or one that another release wrote."""
    try:
        return Plan.model_validate_json((work_dir / PLAN_NAME).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
