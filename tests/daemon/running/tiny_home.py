"""A home whose store has tiny weights, and workers that are real processes but need no torch.

What the real worker stages for a promotion or a revert is staged by the same fold, in this process, just
before the child starts; the child prints the report. A worker that learns sleeps until it is stopped.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from daemon.batch import Batch, BatchClass, BatchImage
from daemon.config import AttemptsConfig, Config, InboxConfig
from daemon.exams import keep_exam
from daemon.home import create_home
from daemon.lifecycle import Launch
from daemon.progress import LineView
from daemon.report import ExamResult, Report
from daemon.service import Service
from daemon.spool import Spool, State
from deploy import atomic
from deploy.delta import load_delta
from deploy.manifest import DELTA_NAME
from deploy.rebuild import stage_rebuild
from deploy.store import VersionStore
from tests.deploy.tiny import found_tiny, stage_revert, stage_update

CONFIG = Config(
    inbox=InboxConfig(settle_seconds=0, gather_seconds=0, scan_seconds=60),
    attempts=AttemptsConfig(max=3, backoff_seconds=10),
)


def batch_name(number: int) -> str:
    """Id of the batch of that number."""
    return f"{number:06d}-class-{number}"


class TinyHome:
    """A home, its service, and what tests do with them."""

    def __init__(self, home: Path, config: Config = CONFIG) -> None:
        self.home, self.config = home, config
        self.spool, self.store = Spool(home), VersionStore(home / "serving")
        self.exams: list[ExamResult] = []  # what the next promotion or revert is graded
        self.child: list[str] | None = None  # instead of the worker that prints the report
        self.now = 0.0

    def create(self, published: int) -> None:
        """Versions 0 to `published`, a batch each, which is in done/ with its exam kept."""
        create_home(self.home)
        found_tiny(self.home / "serving")
        for number in range(1, published + 1):
            self.add("done", number)
            self.store.publish(*stage_update(self.store, batch_name(number), [f"class {number}"]))

    def add(self, state: State, number: int) -> str:
        """A batch of two images in one state of the spool; a held one with the delta it was held with."""
        batch_id = batch_name(number)
        directory = self.spool.state_dir(state) / batch_id
        images = []
        for index, split in enumerate(("train", "exam")):
            path = directory / f"images/class/{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([number, index]).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            shown = {"file": f"images/class/{index}.png", "origin": f"private/holiday-{index}.png"}
            key = f"class {number}"
            images.append(BatchImage(**shown, class_key=key, sha256=sha256, width=8, height=8, split=split))
        name = f"class {number}"
        entry = BatchClass(name=name, key=name, template="a {}", folder="class", is_new=True)
        batch = Batch(
            id=batch_id,
            seq=number,
            slug=f"class-{number}",
            kind="folders",
            received_at="2026-01-01T00:00:00+00:00",
            content_sha256=hashlib.sha256(batch_id.encode()).hexdigest(),
            classes=[entry],
            images=images,
        )
        (directory / "batch.json").write_text(batch.to_json())
        if state == "done":
            keep_exam(self.home, batch, directory, max_images_per_class=9)
        if state == "held":
            self._hold(batch, directory)
        return batch_id

    def _hold(self, batch: Batch, directory: Path) -> None:
        staging, manifest = stage_update(self.store, batch.id, [batch.classes[0].name])
        atomic.make_dir(directory / "result")
        (staging / DELTA_NAME).rename(directory / "result" / DELTA_NAME)
        atomic.remove_tree(staging)
        draft = manifest.model_dump(mode="json", by_alias=True)
        report = Report(batch=batch.id, parent=self.store.current(), manifest=draft)
        (directory / "result" / "report.json").write_text(report.model_dump_json())
        (directory / "result" / "decision.json").write_text('{"outcome": "hold", "rules": []}')

    def start(self) -> Service:
        """A service that starts anew from what is on disk."""
        launch = Launch(make_command=self.make_command)
        self.service = Service(self.home, self.config, view=LineView(), launch=launch)
        self.service.start()
        return self.service

    def tick(self) -> None:
        """One iteration."""
        self.now += 0.01
        self.service.tick(self.now)

    def make_command(self, command: str, *arguments: str) -> list[str]:
        """Stage what the worker would; the command line of the child that reports it."""
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        if command == "adapt":
            return ["sleep", "300"]
        if command == "rebuild":
            result: dict[str, Any] = {"files": stage_rebuild(self.store, int(given["--version"]))}
        else:
            result = {"report": self._revise(command, given["--batch"])}
        said = self.home / "said.jsonl"
        said.write_text(json.dumps({"event": "result", **result}) + "\n")
        return self.child or ["cat", str(said)]

    def _revise(self, command: str, batch_id: str) -> dict[str, Any]:
        if command == "revert":
            _, manifest = stage_revert(self.store, batch_id)
        else:
            delta = load_delta(self.spool.state_dir("held") / batch_id / "result" / DELTA_NAME)
            names = [f"class {int(batch_id.split('-', maxsplit=1)[0])}"]
            staging, manifest = stage_update(self.store, batch_id, names, kind="promote", delta=delta)
            atomic.remove_tree(staging.with_name(f".staging-promote-{batch_id}"))
            staging.rename(staging.with_name(f".staging-promote-{batch_id}"))
        draft = manifest.model_dump(mode="json", by_alias=True)
        report = Report(batch=batch_id, parent=manifest.parent or 0, manifest=draft, exams=tuple(self.exams))
        return report.model_dump(mode="json")
