"""From the cells' files to figures: Transfer, Average, Last and the rest, over seeds, as JSON and Markdown.

Accuracies are per cent. `own` chooses among the names of the image's own pack (MTIL), `union` among those of
all ten (X-TAIL), which is what a deployed model faces.
"""

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import reporting
from benchmarks.stream.cell import Setting
from benchmarks.stream.methods import CHANGING, METHODS
from benchmarks.stream.packs import PROBES, STREAM
from dynlora import evaluate

REFERENCE = "default"  # what the others are compared with, seed by seed
_FORMATS = {"delta_norm": ".2f", "drift": ".2f", "added_parameters": ",.0f"}


def figures(cell: dict[str, Any]) -> dict[str, float]:
    """One cell's headline figures; joint training has one row only, its Last."""
    found: dict[str, float] = {}
    for space in ("union", "own"):
        r = np.array(cell[space])
        if len(r) == r.shape[1]:
            found[f"{space}_transfer"] = float(np.nanmean(evaluate.transfer(r)))
            found[f"{space}_average"] = float(evaluate.average(r).mean())
            found[f"{space}_forgetting"] = float(evaluate.forgetting(r).mean())
            found[f"{space}_backward"] = evaluate.backward_transfer(r)
        found[f"{space}_last"] = float(evaluate.last(r).mean())
    found["negative_flips"] = float(np.mean(cell["negative_flips"]))
    found |= {probe: cell["probes"][probe] for probe in cell["probes"]}
    drops = {"delta_norm": cell["delta_norm"], "drift": cell["drift"][-1:], "kept_rank": cell["kept_rank"]}
    for key, values in drops.items():  # None where a method has none, as those that leave the weights alone
        if known := [value for value in values if value is not None]:
            found[key] = float(np.mean(known))
    found["seconds"] = float(np.sum(cell["seconds"]))
    found["added_parameters"] = float(cell["added_parameters"])
    return found


def write(folder: Path, setting: Setting) -> None:
    """Report on all cells in `folder`; nothing where there is none."""
    cells = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not cells:
        return
    by_method: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    for cell in cells:
        by_method[cell["method"]][cell["seed"]] = figures(cell)
    grids = {
        tuned["method"]: tuned
        for tuned in (json.loads(path.read_text()) for path in sorted((folder / "tuned").glob("*.json")))
    }
    result = {
        "machine": cells[-1]["machine"],
        "setting": asdict(setting),
        "seeds": {name: sorted(seeds) for name, seeds in by_method.items()},
        "means": {name: means(list(seeds.values())) for name, seeds in by_method.items()},
        "paired": {
            name: paired(seeds, by_method[REFERENCE])
            for name, seeds in by_method.items()
            if name != REFERENCE and REFERENCE in by_method
        },
        "tuning": grids,
    }
    name = f"stream-{folder.name}"
    (folder.parent.parent / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder.parent.parent / f"{name}.md").write_text(text(result, cells) + "\n")
    try:
        from benchmarks.stream import plots
    except ModuleNotFoundError as error:
        print(f"no plots: {error.name} is not installed; pip install 'dynlora[plots]'")
        return
    plots.draw(cells, folder.parent.parent / f"{name}.svg")


def means(runs: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each figure over seeds."""
    return {key: round(float(np.mean([run[key] for run in runs])), 3) for key in runs[0]}


def paired(
    runs: dict[int, dict[str, float]], reference: dict[int, dict[str, float]]
) -> dict[str, dict[str, float | None]]:
    """The reference minus the method, seed by seed: mean and its standard error over common seeds."""
    seeds = sorted(runs.keys() & reference.keys())
    found = {}
    for key in ("union_transfer", "union_average", "union_last"):
        pairs = [(reference[s].get(key, np.nan), runs[s].get(key, np.nan)) for s in seeds]
        if seeds and not np.isnan(pairs).any():
            mean, error = evaluate.paired_difference(*np.array(pairs).T)
            spread = round(error, 3) if len(seeds) > 1 else None  # one seed says nothing of it
            found[key] = {"mean": round(mean, 3), "error": spread, "seeds": len(seeds)}
    return found


def text(result: dict[str, Any], cells: list[dict[str, Any]]) -> str:
    """The Markdown report."""
    where, setting = result["machine"], result["setting"]
    names = [name for name in METHODS if name in result["means"]]
    one_class = f"each class a task of {setting['class_steps']} steps"
    drop = one_class if setting["one_class"] else f"ten tasks of {setting['steps']} steps"
    intro = (
        f"# stream\n\n{where['date']}, {where['cpu']}, {where['cores']} cores shared with other work; torch "
        f"{where['torch']}. {drop} on {setting['batch_size']} images, {setting['shots']} images a "
        f"class, at most {setting['test_per_class']} test images a class. Bundled "
        "model, per cent, means over seeds. `joint` learns all at once: an upper bound. The default's steps "
        "look at no image, and there are 3.75 times as many of them." + _about_changing(names)
    )
    main = [
        ("seeds", lambda m: " ".join(map(str, result["seeds"][m]))),
        *(
            (k, _cell(result, f"union_{k}"))
            for k in ("transfer", "average", "last", "forgetting", "backward")
        ),
        ("negative flips", _cell(result, "negative_flips")),
        *((f"own {k}", _cell(result, f"own_{k}")) for k in ("transfer", "average", "last")),
    ]
    kept = [
        *((probe, _cell(result, probe)) for probe in PROBES),
        ("‖ΔW‖ a drop", _cell(result, "delta_norm")),
        ("drift", _cell(result, "drift")),
        ("kept rank", _cell(result, "kept_rank")),
        ("seconds", _cell(result, "seconds")),
        ("added parameters", _cell(result, "added_parameters")),
    ]
    parts = [
        intro,
        "## Learning, among the names of all tasks (own: of the image's task)",
        _table(names, main),
    ]
    parts += ["## Keeping, and what it cost", _table(names, kept)]
    if result["paired"]:
        parts += [
            f"## {REFERENCE} minus the method, paired by seed (± standard error)",
            _paired(result, names),
        ]
    parts += ["## Settings tried, on held-out training images", _grids(result["tuning"], names)]
    for name in names:
        cell = next(c for c in cells if c["method"] == name)
        parts += [f"## R of {name}, seed {cell['seed']}, union", _matrix(cell)]
    return "\n\n".join(parts)


def _cell(result: dict[str, Any], key: str) -> Any:
    def of(method: str) -> str:
        value = result["means"][method].get(key)
        return "" if value is None else format(value, _FORMATS.get(key, ".1f"))

    return of


def _table(names: list[str], columns: list[tuple[str, Any]]) -> str:
    header = ["method", *(title for title, _ in columns)]
    return reporting.table(header, [[marked(name), *(of(name) for _, of in columns)] for name in names])


def marked(name: str) -> str:
    """A method's name, and whether it could be deployed."""
    return f"{name} (changes the architecture)" if name in CHANGING else name


def _about_changing(names: list[str]) -> str:
    if not set(CHANGING).intersection(names):
        return ""
    return (
        " What changes the architecture cannot be merged: it has neither ‖ΔW‖ nor drift, and nothing that is "
        "said of mergeable methods is said of it. Added parameters: what inference needs after the last task."
    )


def _paired(result: dict[str, Any], names: list[str]) -> str:
    keys = ("union_transfer", "union_average", "union_last")
    rows = []
    for name in names:
        found = result["paired"].get(name, {})
        if found:
            seeds = next(iter(found.values()))["seeds"]
            rows.append([marked(name), seeds, *(_difference(found.get(key)) for key in keys)])
    return reporting.table(["method", "seeds", "transfer", "average", "last"], rows)


def _difference(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    error = f" ± {found['error']:.1f}" if found["seeds"] > 1 else ""
    return f"{found['mean']:+.1f}{error}"


def _grids(grids: dict[str, Any], names: list[str]) -> str:
    rows = []
    for name in names:
        for trial in grids.get(name, {}).get("trials", []):
            params = {key: value for key, value in trial.items() if key != "score"}
            mark = "chosen" if params == grids[name]["params"] else ""
            rows.append([marked(name), params, f"{trial['score']:.2f}", mark])
    return reporting.table(["method", "settings", "score", ""], rows)


def _matrix(cell: dict[str, Any]) -> str:
    short = [name.split("_")[0] for name in STREAM]
    rows = [["before", *cell["zero_shot"]["union"]]]
    rows += [[f"after {i + 1}", *row] for i, row in enumerate(cell["union"])]
    return reporting.table(["", *short], [[r[0], *(f"{v:.1f}" for v in r[1:])] for r in rows])
