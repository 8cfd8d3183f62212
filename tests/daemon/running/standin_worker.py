"""A worker that learns nothing, for tests of the daemon: it follows the protocol and `behaviour.json`.

Keys of behaviour.json, all optional: `steps`, `step_seconds`; `exams` ([images, before, gained, lost] each,
the batch's own first); `grade_all` (a row for every kept exam, and ranks, as in real manifests); `fail`
(sentence) with `retry` and `fault`; `die` (signal number, before any result); `torn` (cut the staged weights
short); `silent` (end well without a report); `only` (batch ids that fail, die or are torn; default all).
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from daemon.batch import read_batch
from daemon.plan import PLAN_NAME, Plan
from daemon.report import ExamResult, Report
from deploy import atomic
from deploy.manifest import MANIFEST_NAME, record_files
from deploy.store import VersionStore


def say(event, **fields):
    """One protocol message."""
    print(json.dumps({"event": event, **fields}), flush=True)


def learn(home, batch_id, parent, behaviour):
    """Checkpoint every step; obey SIGTERM; leave a staged copy of the parent and a report."""
    work_dir = home / "spool" / "work" / batch_id
    batch = read_batch(work_dir)
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    checkpoint = work_dir / "checkpoint" / "checkpoint.safetensors"
    atomic.make_dir(checkpoint.parent)
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    plan = plan_for(batch, parent)
    if first == 0:
        atomic.write_text(work_dir / PLAN_NAME, plan.model_dump_json(by_alias=True))
    say("phase", phase="train")
    resumed = {"resumed_at": first} if first else {}
    steps = behaviour.get("steps", 2)
    for step in range(first + 1, steps + 1):
        time.sleep(behaviour.get("step_seconds", 0.01))
        atomic.write_text(checkpoint, str(step))
        say("step", step=step, steps=steps, loss=1.0 / step, kept_rank=4.0, eta_seconds=0.1, **resumed)
        if stopped:
            return 75
    only = behaviour.get("only")
    if only is None or batch_id in only:
        if "die" in behaviour:
            os.kill(os.getpid(), behaviour["die"])
        if "fail" in behaviour:
            say(
                "error",
                message=behaviour["fail"],
                retry=behaviour.get("retry", True),
                fault=behaviour.get("fault"),
            )
            return 1
        if behaviour.get("silent"):
            return 0
    stage(home, batch, parent, behaviour)
    say("result")
    return 0


def plan_for(batch, parent):
    """A plan that names its parent, as every plan does."""
    return Plan(
        batch=batch.id,
        content_sha256=batch.content_sha256,
        parent=parent,
        parent_weights_sha256="0" * 64,
        seed=1,
        splits={},
        threads=1,
        preset="default",
        settings={},
        software={},
    )


def stage(home, batch, parent, behaviour):
    """The parent once more, with a delta that says which batch it is."""
    store = VersionStore(home / "serving")
    result = home / "spool" / "work" / batch.id / "result"
    atomic.make_dir(result)
    atomic.write_text(result / "delta.safetensors", f"delta of {batch.id}")
    staging = store.stage(batch.id, like=parent)
    for path in store.path(parent).iterdir():
        if path.name != MANIFEST_NAME and not (staging / path.name).exists():
            shutil.copyfile(path, staging / path.name)
    shutil.copyfile(result / "delta.safetensors", staging / "delta.safetensors")
    manifest = store.manifest(parent)
    files = record_files(staging)
    if behaviour.get("torn") and batch.id in behaviour.get("only", [batch.id]):
        os.truncate(staging / "weights.safetensors", 1_000_000)
    rows = behaviour.get("exams", [[40, 10, 20, 0]])
    exams = [
        ExamResult(
            batch=batch.id if i == 0 else f"older-{i}",
            images=images,
            correct_before=before,
            correct_after=before + gained - lost,
            gained=gained,
            lost=lost,
        )
        for i, (images, before, gained, lost) in enumerate(rows)
    ]
    if behaviour.get("grade_all"):
        exams += [
            ExamResult(batch=kept.name, images=2, correct_before=1, correct_after=1, gained=0, lost=0)
            for kept in sorted((home / "exams").iterdir())
        ]
    lineage = [entry.model_dump() for entry in manifest.lineage]
    draft = {
        "parent": parent,
        "kind": "update",
        "batch": {
            "id": batch.id,
            "classes": [entry.name for entry in batch.classes],
            "images": {split: batch.count(split) for split in ("train", "tune", "exam")},
            "content_sha256": batch.content_sha256,
            "producer_id": batch.producer_id,
        },
        "lineage": [*lineage, {"batch": batch.id, "delta_sha256": files["delta.safetensors"].sha256}],
        "architecture": manifest.architecture,
        "embed_dim": manifest.embed_dim,
        "context_length": manifest.context_length,
        "logit_scale": manifest.logit_scale,
        "files": {name: record.model_dump() for name, record in files.items()},
        "metrics": {
            "exams": [
                {
                    "batch": e.batch,
                    "images": e.images,
                    "accuracy_before": e.correct_before / e.images,
                    "accuracy_after": e.correct_after / e.images,
                    "negative_flips": e.lost,
                }
                for e in exams
            ]
        },
    }
    if behaviour.get("grade_all"):
        draft["ranks"] = {f"vision.transformer.resblocks.{n}.mlp.c_fc.weight": 4 for n in range(60)}
    report = Report(batch=batch.id, parent=parent, manifest=draft, exams=tuple(exams))
    atomic.write_text(result / "report.json", report.model_dump_json())


def main():
    """The worker's command line, `adapt` and `standby` only."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    parser.add_argument("--home", type=Path)
    parser.add_argument("--config")
    parser.add_argument("--batch")
    parser.add_argument("--parent", type=int)
    options = parser.parse_args()
    if options.command == "standby":
        order = sys.stdin.readline()
        if not order:
            sys.exit(75)
        options = parser.parse_args(json.loads(order)["arguments"])
    path = options.home / "behaviour.json"
    behaviour = json.loads(path.read_text()) if path.exists() else {}
    sys.exit(learn(options.home, options.batch, options.parent, behaviour))


if __name__ == "__main__":
    main()
