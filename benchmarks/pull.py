"""What an edge machine moves per update, and that it ends with the same weights.

    python -m benchmarks.pull [--quick] [--model ViT-B-16] [--updates 3] [--rank 16] [--output FILE]

A store of random weights (or of the bundled model) gets updates of random factors of one rank in every
matrix that the learner adapts, which is what a delta weighs at worst: pruned ones are smaller. `dynlora pull`
runs as a process against a static web server over a mirror of the store. `--quick` is the bundled model.
"""

import argparse
import contextlib
import functools
import http.server
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch

from deploy.delta import Delta, Factor, load_delta, save_delta, write_folded
from deploy.export import REFERENCE_TEXTS, export_graphs, reference_outputs, state_arrays
from deploy.manifest import (
    BatchInfo,
    ClassEntry,
    ClassesFile,
    ImageCounts,
    LineageEntry,
    Manifest,
    class_key,
    file_record,
    record_files,
    save_classes,
)
from deploy.mirror import FolderTarget, mirror
from deploy.preprocess import Preprocessing
from deploy.store import VersionStore
from deploy.tokenize import build_tokenizer_json
from deploy.weights import read_weights, write_weights
from dynlora.clip import BUNDLED_CONFIG, BUNDLED_WEIGHTS

# The attention and MLP matrices, under the names of open_clip's own towers and of timm's.
ADAPTED = (
    *("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight"),
    *("attn.qkv.weight", "attn.proj.weight", "fc1.weight", "fc2.weight"),
)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A static file server without a log."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder; gives the address."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Maker:
    """Publishes versions of one architecture."""

    def __init__(self, name: str) -> None:
        open_clip.add_model_config(str(BUNDLED_CONFIG))
        self.name = BUNDLED_CONFIG.stem if name == "bundled" else name
        torch.manual_seed(0)
        weights = str(BUNDLED_WEIGHTS) if name == "bundled" else None
        self.model = open_clip.create_model(self.name, pretrained=weights, precision="fp32").eval()
        self.tokenizer = open_clip.get_tokenizer(self.name)

    def first(self, store: VersionStore) -> None:
        """Publish version 0."""
        model, staging = self.model, store.stage("initial")
        size, context = model.visual.image_size, model.context_length
        export_graphs(model, staging, context_length=context, image_size=size)
        preprocess = open_clip.get_model_preprocess_cfg(model)
        Preprocessing.from_open_clip_cfg(preprocess).save(staging / "preprocessor_config.json")
        ranks = self.tokenizer.bpe_ranks
        text = build_tokenizer_json(self.tokenizer.encoder, sorted(ranks, key=ranks.__getitem__), context)
        (staging / "tokenizer.json").write_text(text, encoding="utf-8")
        config = {"model_cfg": open_clip.get_model_config(self.name), "preprocess_cfg": preprocess}
        (staging / "open_clip_config.json").write_text(json.dumps(config))
        write_weights(staging / "weights.safetensors", state_arrays(model))
        self.finish(store, staging, version=0, kind="initial")

    def update(self, store: VersionStore, *, rank: int, seed: int) -> None:
        """Publish one more version: random factors in every adapted matrix."""
        live = store.live_manifest()
        staging, batch = store.stage(f"batch-{seed}", like=live.version), f"{seed:06d}-random"
        record = save_delta(staging / "delta.safetensors", self.delta(rank, seed))
        base = read_weights(store.path(live.version) / "weights.safetensors")
        write_folded(staging / "weights.safetensors", base, [load_delta(staging / "delta.safetensors")])
        folded = read_weights(staging / "weights.safetensors")
        self.model.load_state_dict({name: torch.from_numpy(np.array(w)) for name, w in folded.items()})
        counts = ImageCounts(train=8, tune=0, exam=2)
        info = BatchInfo(id=batch, classes=("cup",), images=counts, content_sha256=record.sha256)
        lineage = (*live.lineage, LineageEntry(batch=batch, delta_sha256=record.sha256))
        origin: dict[str, Any] = {"parent": live.version, "batch": info, "lineage": lineage}
        self.finish(store, staging, version=store.next_version(), kind="update", **origin)

    def delta(self, rank: int, seed: int) -> Delta:
        """Random factors; q, k and v as one matrix, as large as three of them."""
        rng = np.random.default_rng(seed)

        def factor(key: str, rows: int, columns: int) -> Factor:
            parts = [(rows, rank), (rank, columns), (rank,)]
            values = [np.float32(0.02) * rng.standard_normal(shape).astype(np.float32) for shape in parts]
            return Factor(key, 0, rows, *values)

        shapes = {name: tuple(value.shape) for name, value in self.model.state_dict().items()}
        return Delta(factor(name, *shape) for name, shape in shapes.items() if name.endswith(ADAPTED))

    def finish(self, store: VersionStore, staging: Path, **origin: Any) -> None:
        """Write classes, embeddings and reference outputs of the weights the model now has, and publish."""
        names = [f"class {number}" for number in range(100)]
        entries = [ClassEntry(name=n, key=class_key(n), template="a photo of a {}.") for n in names]
        save_classes(staging, ClassesFile(classes=tuple(entries)))
        with torch.no_grad():
            tokens = self.tokenizer([f"a photo of a {name}." for name in names])
            embeddings = self.model.encode_text(tokens, normalize=True).numpy()
        np.save(staging / "class_embeddings.npy", embeddings)
        input_ids = self.tokenizer(list(REFERENCE_TEXTS)).numpy()
        reference_outputs(self.model, staging, input_ids=input_ids, image_size=self.model.visual.image_size)
        manifest = Manifest(
            architecture=self.name,
            embed_dim=embeddings.shape[1],
            context_length=self.model.context_length,
            logit_scale=self.model.logit_scale.exp().item(),
            files=record_files(staging),
            **origin,
        )
        store.publish(staging, manifest)


def pull(address: str, edge: Path) -> dict[str, Any]:
    """Run one `dynlora pull` and return its report."""
    command = [sys.executable, "-m", "daemon.cli", "pull", address, str(edge), "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(folder: Path, *, model: str, updates: int, rank: int) -> dict[str, Any]:
    """The whole story of one model."""
    store, edge, rows = VersionStore(folder / "serving"), folder / "edge", []
    store.create()
    maker = Maker(model)
    maker.first(store)
    with serving(folder / "mirror") as address:
        for seed in range(updates + 1):
            if seed:
                maker.update(store, rank=rank, seed=seed)
            mirror(store, FolderTarget(folder / "mirror"))
            started = time.perf_counter()
            report = pull(address, edge)
            weights = [root / f"versions/{seed}/weights.safetensors" for root in (store.serving_dir, edge)]
            assert file_record(weights[0]) == file_record(weights[1]), "the folded weights differ"
            delta = store.path(seed) / "delta.safetensors"
            rows.append(
                {
                    "version": report["version"],
                    "bytes_moved": report["bytes_moved"],
                    "of_weights": round(report["bytes_moved"] / report["weights_bytes"], 5),
                    "delta_bytes": delta.stat().st_size if delta.exists() else 0,
                    "deltas_folded": report["deltas_folded"],
                    "pull_seconds": round(report["seconds"], 2),
                    "process_seconds": round(time.perf_counter() - started, 2),
                    "same_hash": True,
                }
            )
            store.prune(2)
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    weights_bytes = (edge / "versions/0/weights.safetensors").stat().st_size
    worst = max(row["of_weights"] for row in rows[1:])
    return {
        "model": maker.name,
        "rank": rank,
        "weights_bytes": weights_bytes,
        "worst_update": worst,
        "pulls": rows,
    }


def main() -> None:
    """Measure, print, and fail where an update moved more than a twentieth of the weights."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-16", help="an open_clip architecture, or bundled")
    parser.add_argument("--quick", action="store_true", help="the bundled model, two updates")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16, help="of every matrix; a pruned delta keeps less")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    model, updates = ("bundled", 2) if given.quick else (given.model, given.updates)
    with tempfile.TemporaryDirectory(prefix="dynlora-pull-") as folder:
        result = measure(Path(folder), model=model, updates=updates, rank=given.rank)
    text = json.dumps(result, indent=2)
    print(text)
    if given.output:
        given.output.write_text(text + "\n")
    # A small model's reference pictures and rank are large beside its weights; the promise is about ViT-B/16.
    sys.exit(1 if not given.quick and result["worst_update"] > 0.05 else 0)


if __name__ == "__main__":
    main()
