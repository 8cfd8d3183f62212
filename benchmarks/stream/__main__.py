"""Ten tasks one after the other on the bundled model: what is learnt, what is kept, method by method.

    python -m benchmarks.stream [--methods default paper …] [--seeds 0 1 …] [--one-class] [--quick]

Every (method, seed, setting) is a file in benchmarks/results/stream; what is there already is not run again,
so the command can be stopped at any time. The report is written anew after each cell:
benchmarks/results/stream-<setting>-<weights>.json, .md and, with matplotlib, .svg.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

from benchmarks import reporting
from benchmarks.stream import report
from benchmarks.stream.cell import Setting, Stream, run_cell, tune
from benchmarks.stream.methods import METHODS
from benchmarks.stream.packs import PROBES, STREAM, Pack
from deploy.preprocess import Preprocessing
from dynlora import load_clip
from dynlora.clip import BUNDLED_WEIGHTS

CELLS_DIR = reporting.RESULTS_DIR / "stream"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parsed = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parsed.add_argument("--data", type=Path, default=Path("../shared/data"))
    parsed.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parsed.add_argument("--seeds", nargs="+", type=int, default=[0])
    parsed.add_argument("--shots", type=int, default=16, help="training images per class")
    parsed.add_argument("--steps", type=int, default=60, help="of each task, for all methods")
    parsed.add_argument("--batch-size", type=int, default=24)
    parsed.add_argument("--test-per-class", type=int, default=20)
    parsed.add_argument("--one-class", action="store_true", help="every class is a task of its own")
    parsed.add_argument("--class-steps", type=int, default=20, help="of each class, with --one-class")
    parsed.add_argument("--quick", action="store_true", help="2 shots, 4 steps, 2 test images per class")
    parsed.add_argument("--cells", type=Path, default=CELLS_DIR, help="where each cell's file is kept")
    return parsed


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, and report on all there is."""
    options = parser().parse_args(arguments)
    setting = Setting(
        options.shots, options.steps, options.batch_size, options.test_per_class,
        one_class=options.one_class, class_steps=options.class_steps,
    )  # fmt: skip
    if options.quick:
        setting = Setting(2, 4, 8, 2, one_class=options.one_class, class_steps=2)
    folder = options.cells / f"{setting.name}-{model_id()}"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{setting.name}: each method does {setting.budget.steps} steps a drop, 3 settings tried at most")
    todo = [(m, s) for s in options.seeds for m in options.methods if not (folder / f"{m}-{s}.json").exists()]
    if todo:
        run(todo, options.data, folder, setting)
    report.write(folder, setting)


def model_id() -> str:
    """Of the bundled weights: cells of other weights are never mixed with theirs."""
    return hashlib.sha256(BUNDLED_WEIGHTS.read_bytes()).hexdigest()[:8]


def run(todo: list[tuple[str, int]], data: Path, folder: Path, setting: Setting) -> None:
    """Run the cells one after the other."""
    clip = load_clip()
    preprocessing = Preprocessing.from_open_clip_cfg(clip.preprocess_cfg)
    packs = {name: Pack(data / f"{name}.zip", preprocessing) for name in STREAM}
    probes = [Pack(data / f"{name}.zip", preprocessing) for name in PROBES]
    stream = Stream(clip, list(packs.values()), probes, setting)
    weights = {key: value.clone() for key, value in clip.model.state_dict().items()}
    where = reporting.machine()
    for number, (name, seed) in enumerate(todo, start=1):
        started = time.monotonic()
        tuned = folder / "tuned" / f"{name}.json"
        tuned.parent.mkdir(exist_ok=True)
        if not tuned.exists():
            params, trials = tune(clip, weights, name, packs, setting)
            _write(tuned, {"method": name, "params": params, "trials": trials})
            print(f"{name}: tuned on held-out training images: {trials} → {params}", flush=True)
        params = json.loads(tuned.read_text())["params"]
        record = run_cell(clip, weights, name, params, seed=seed, stream=stream)
        _write(folder / f"{name}-{seed}.json", record | {"machine": where})
        print(
            f"cell {number} of {len(todo)}: {name}, seed {seed}, {time.monotonic() - started:.0f} s",
            flush=True,
        )
        report.write(folder, setting)


def _write(path: Path, content: dict) -> None:
    """Whole or not at all: a cell that is there is not run again."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    main()
