"""Three domains dropped one after the other, as original-resolution photos; what is learnt and what is kept.

    python -m benchmarks.native_inbox [--data ../shared/data] [--seeds 3] [--preset default]

For each seed: a fresh home, `dynlora run --once` for clothing, then groceries, then objects. Every version is
scored through ONNX Runtime: each domain on its pack's whole test split restricted to the dropped classes,
over the union of all dropped names; Tiny-ImageNet's test split 200-way; cifar10 and pacs_photo zero-shot.
Targets: every domain up by at least 25 points, Tiny-ImageNet down by at most 5.
"""

import argparse
import json
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.packs import decoded, images_of
from benchmarks.program import dynlora
from deploy.runtime import LoadedVersion

DOMAINS = {"clothing": "clothing.zip", "groceries": "groceries.zip", "objects": "caltech_objects.zip"}
PROBES = {
    "tiny_imagenet": "tiny_imagenet_200.zip",
    "cifar10": "cifar10.zip",
    "pacs_photo": "pacs_photo.zip",
}
TEMPLATE = "a photo of a {}."


class Pack:
    """The test split of one pack, decoded once."""

    def __init__(self, path: Path, only: list[str] | None = None) -> None:
        by_class = defaultdict(list)
        for label, name in images_of(path, "test"):
            by_class[label].append(name)
        self.classes = only or sorted(by_class)
        self.images = decoded(path, [name for label in self.classes for name in by_class[label]])
        self.labels = np.repeat(np.arange(len(self.classes)), [len(by_class[n]) for n in self.classes])

    def accuracy(self, version: LoadedVersion, names: list[str]) -> float:
        """Top-1 in per cent over `names`, which include this pack's classes."""
        texts = version.encode_texts([TEMPLATE.format(name) for name in names])
        images = np.concatenate(
            [version.encode_images(self.images[i : i + 64]) for i in range(0, len(self.images), 64)]
        )
        columns = np.array([names.index(name) for name in self.classes])
        return float(np.mean((images @ texts.T).argmax(1) == columns[self.labels]) * 100)


def one_seed(seed: int, options: argparse.Namespace, packs: dict[str, Pack], probes: dict[str, Pack]) -> dict:
    """Figures of one life of three batches."""
    union = [name for pack in packs.values() for name in pack.classes]
    figures: dict = {"seed": seed, "accuracy": [], "seconds": []}
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch, "home")
        dynlora(home, "init")
        (home / "config.toml").write_text(
            "[inbox]\nsettle_seconds = 0.5\ngather_seconds = 0.5\nscan_seconds = 0.5\n"
            f'[learning]\nseed = {seed}\npreset = "{options.preset}"\n'
        )
        figures["accuracy"].append(score(home, packs, probes, union))
        for domain in packs:
            with zipfile.ZipFile(options.data / "native_inbox.zip") as archive:
                members = [
                    n for n in archive.namelist() if n.startswith(f"{domain}/") and not n.endswith("/")
                ]
                archive.extractall(home / "inbox", members)
            started = time.monotonic()
            dynlora(home, "run", "--once")
            figures["seconds"].append(round(time.monotonic() - started, 1))
            figures["accuracy"].append(score(home, packs, probes, union))
            print(f"seed {seed}, after {domain}: {figures['accuracy'][-1]}", flush=True)
    return figures


def score(home: Path, packs: dict[str, Pack], probes: dict[str, Pack], union: list[str]) -> dict[str, float]:
    """Accuracy of the live version on everything, in per cent."""
    version = LoadedVersion((home / "serving" / "current").resolve())
    try:
        domains = {name: pack.accuracy(version, union) for name, pack in packs.items()}
        kept = {name: pack.accuracy(version, pack.classes) for name, pack in probes.items()}
    finally:
        version.close()
    return {name: round(value, 2) for name, value in (domains | kept).items()}


def summarise(runs: list[dict], domains: list[str]) -> list[str]:
    """Markdown: mean over seeds, before anything, right after the own drop, at the end; and the probes."""
    rows = [
        "| domain | before | right after its drop | at the end | gain at the end |",
        "|---|---|---|---|---|",
    ]
    for place, domain in enumerate(domains, start=1):
        before, after, end = (
            np.mean([run["accuracy"][i][domain] for run in runs]) for i in (0, place, len(domains))
        )
        rows.append(f"| {domain} | {before:.1f} | {after:.1f} | {end:.1f} | {end - before:+.1f} |")
    for probe in PROBES:
        values = [np.mean([run["accuracy"][i][probe] for run in runs]) for i in (0, len(domains))]
        rows.append(
            f"| {probe} (kept) | {values[0]:.1f} | | {values[1]:.1f} | {values[1] - values[0]:+.1f} |"
        )
    return rows


def main() -> None:
    """Run, print, and write results/native_inbox.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--preset", default="default")
    options = parser.parse_args()
    if not (options.data / "native_inbox.zip").exists():
        sys.exit(f"{options.data} holds no native_inbox.zip; name the folder of the image packs with --data")
    with zipfile.ZipFile(options.data / "native_inbox.zip") as archive:
        folders = sorted({tuple(name.split("/")[:2]) for name in archive.namelist() if name.count("/") == 2})
    packs = {
        domain: Pack(options.data / pack, [name for d, name in folders if d == domain])
        for domain, pack in DOMAINS.items()
    }
    probes = {name: Pack(options.data / pack) for name, pack in PROBES.items()}
    runs = [one_seed(seed, options, packs, probes) for seed in range(options.seeds)]
    for row in summarise(runs, list(packs)):
        print(row)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "native_inbox.json").write_text(json.dumps({"preset": options.preset, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
