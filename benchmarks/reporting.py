"""Results on paper: JSON for programs and Markdown for people, side by side in benchmarks/results."""

import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS_DIR = Path(__file__).parent / "results"
_PACKAGES = ("numpy", "onnxruntime", "torch")


def machine() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")),
        platform.machine(),
    )  # fmt: skip
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        **{name: version(name) for name in _PACKAGES},
    }


def verdict(value: float, *, goal: float, at_least: bool = False) -> str:
    """`goal 3, met` or `goal 3, MISSED`."""
    is_met = value >= goal if at_least else value <= goal
    return f"goal {'≥' if at_least else '≤'} {goal:g}, {'met' if is_met else 'MISSED'}"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def save(name: str, result: dict[str, Any], text: str) -> None:
    """Write results/<name>.json and .md, and print the text."""
    RESULTS_DIR.mkdir(exist_ok=True)
    where = result["machine"]
    title = (
        f"# {name}\n\n{where['date']}, {where['cpu']}, {where['cores']} cores, load {where['load_before']}"
    )
    software = ", ".join(f"{package} {where[package]}" for package in _PACKAGES)
    (RESULTS_DIR / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS_DIR / f"{name}.md").write_text(f"{title}; {software}.\n\n{text}\n")
    print(text)
