"""The two published protocols, MTIL and X-TAIL, with our figures beside the paper's.

Settings are the published ones (500 steps of 64 images, 5e-4), so nothing is tuned. MTIL chooses among the
names of the image's own data set, X-TAIL among those of all.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import reporting
from benchmarks.published.domains import MTIL, XTAIL, DomainPack
from benchmarks.stream.cell import Setting, Stream, run_cell
from benchmarks.stream.methods import Params
from benchmarks.stream.report import figures
from deploy.preprocess import Preprocessing
from dynlora import evaluate, load_clip

PARAMS: dict[str, Params] = {
    "zero-shot": {},
    "lora-16": {"learning_rate": 5e-4},
    "paper": {"learning_rate": 5e-4},
    "default": {"pace": 1.0},
}


@dataclass(frozen=True)
class Protocol:
    """What is learnt in which order, and what the paper reports: Transfer, Average, Last per cent."""

    name: str
    domains: tuple[str, ...]
    shots: int
    space: str  # "own" | "union"
    published: dict[str, tuple[float | None, float | None, float | None]]


PROTOCOLS = {
    "mtil": Protocol(
        "mtil", MTIL, 5, "own",
        {
            "zero-shot": (69.4, None, None), "WiSE-FT": (57.7, 63.7, 71.9), "ZSCL": (65.3, 64.4, 67.4),
            "MoE-Adapter": (68.9, 71.4, 76.1), "RAIL-Primal": (69.4, 71.9, 77.2),
            "CoDyRA": (70.1, 73.3, 78.0),
        },
    ),
    "xtail": Protocol(
        "xtail", XTAIL, 16, "union",
        {
            "LoRA r=16": (61.8, 60.5, 59.4), "ZSCL": (59.0, 60.0, 63.4), "MoE-Adapter": (56.0, 63.0, 70.5),
            "RAIL-Primal": (62.4, 70.7, 79.1), "CoDyRA": (63.2, 71.3, 79.2),
        },
    ),
}  # fmt: skip


def main(name: str, arguments: list[str] | None = None) -> None:
    """Run what is missing of one protocol, print and write results/<protocol>.json and .md."""
    protocol = PROTOCOLS[name]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True, help="folder of the data sets, as CoOp has them")
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--pretrained", default="openai")
    parser.add_argument("--methods", nargs="+", default=list(PARAMS), choices=list(PARAMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--shots", type=int, default=protocol.shots)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--test-per-class", type=int, help="[default: the whole test split]")
    parser.add_argument("--results", type=Path, default=reporting.RESULTS_DIR)
    options = parser.parse_args(arguments)
    cells = run(protocol, options)
    text = report(protocol, cells)
    print(text)
    document = {"machine": cells[0]["machine"], "model": options.model, "cells": cells}
    (options.results / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    (options.results / f"{name}.md").write_text(f"# {name}\n\n{options.model}.\n\n{text}\n")


def run(protocol: Protocol, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every wanted cell, from its file where it is there."""
    setting = Setting(options.shots, options.steps, options.batch_size, options.test_per_class)
    folder = (
        options.results
        / protocol.name
        / f"{options.model.replace(':', '-').replace('/', '-')}-{setting.name}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {(m, s): folder / f"{m}-{s}.json" for s in options.seeds for m in options.methods}
    if any(not path.exists() for path in wanted.values()):
        bundled = options.model == "bundled"
        clip = load_clip(options.model, None if bundled else options.pretrained)
        preprocessing = Preprocessing.from_open_clip_cfg(clip.preprocess_cfg)
        packs = [DomainPack(options.root, domain, preprocessing) for domain in protocol.domains]
        stream = Stream(clip, packs, [], setting)
        weights = {key: value.clone() for key, value in clip.model.state_dict().items()}
        where = reporting.machine()
        for (method, seed), path in wanted.items():
            if not path.exists():
                record = run_cell(clip, weights, method, PARAMS[method], seed=seed, stream=stream)
                part = path.with_suffix(".part")
                part.write_text(json.dumps(record | {"machine": where}, indent=1) + "\n")
                part.replace(path)
    return [json.loads(path.read_text()) for path in wanted.values()]


def report(protocol: Protocol, cells: list[dict[str, Any]]) -> str:
    """Ours (means over seeds) and the paper's, and accuracy at the end data set by data set."""
    keys = [f"{protocol.space}_{key}" for key in ("transfer", "average", "last")]
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    own = {m: [cell for cell in cells if cell["method"] == m] for m in methods}
    rows: list[list[str]] = []
    for method, runs in own.items():
        means = [np.mean([figures(cell)[key] for cell in runs]) for key in keys]
        rows.append([f"{method}, ours, {len(runs)} seeds", *(f"{value:.1f}" for value in means)])
    for method, values in protocol.published.items():
        rows.append([f"{method}, published", *("" if v is None else f"{v:.1f}" for v in values)])
    ends = [
        [
            m,
            *(
                f"{v:.1f}"
                for v in np.mean([evaluate.last(np.array(c[protocol.space])) for c in runs], axis=0)
            ),
        ]
        for m, runs in own.items()
    ]
    return (
        reporting.table(["method", "Transfer", "Average", "Last"], rows)
        + "\n\nAt the end:\n\n"
        + reporting.table(["method", *protocol.domains], ends)
    )
