"""The course of one batch's training, step by step: `steps.jsonl` in the batch's directory.

Written by the worker where somebody reads it (MLflow), a line for each step; nothing is decided by it. After
a resume some steps come twice, and the later line counts. A crash may cost the last lines.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deploy import atomic, disk

CURVE_NAME = "steps.jsonl"


@dataclass(frozen=True)
class Point:
    """One step: `at` in seconds since the epoch."""

    step: int
    loss: float
    kept_rank: float
    at: float


class CurveWriter:
    """Appends to the curve of one batch; one that cannot be written is given up, and learning goes on.

    Args:
        is_new: training begins: what an earlier attempt left is removed.
    """

    def __init__(self, work_dir: Path, *, is_new: bool) -> None:
        self._path: Path | None = work_dir / CURVE_NAME
        try:
            if is_new:
                disk.unlink(self._path, missing_ok=True)
            else:
                atomic.append_line(self._path, "")  # ends a line that a crash has torn
        except OSError:
            self._path = None

    def add(self, point: Point) -> None:
        """Append one step."""
        if self._path is None:
            return
        try:
            atomic.append_line(self._path, json.dumps([point.step, point.loss, point.kept_rank, point.at]))
        except OSError:  # a full disk: the checkpoint is what matters, and tells of it
            self._path = None


def read_curve(directory: Path) -> list[Point]:
    """The steps in their order, each once; none where there is no curve."""
    try:
        text = (directory / CURVE_NAME).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    points = {point.step: point for point in _points(text)}
    return [points[step] for step in sorted(points)]


def _points(text: str) -> Iterator[Point]:
    for line in text.splitlines():
        try:
            step, loss, kept_rank, at = json.loads(line)
            yield Point(int(step), float(loss), float(kept_rank), float(at))
        except (ValueError, TypeError):
            continue  # torn by a crash
