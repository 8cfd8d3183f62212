"""Fixtures of the whole suite: real published versions of the bundled model, made once and copied."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # beside others: more threads would only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

CLASS_NAMES = ("cat", "harbour", "red t-shirt", "handwritten letter", "pine tree", "bicycle")
TEMPLATE = "a photo of a {}."
# Begun first where several processes share the tests: a long file at the end leaves all but one idle.
LONGEST = (
    *("tests/e2e", "tests/faults/test_lives.py", "tests/dynlora/test_retaining.py"),
    *("tests/examples/test_pretrain.py", "tests/benchmarks/test_stream.py", "tests/deploy/test_export.py"),
    *("tests/daemon/running/test_analyze.py", "tests/deploy/test_client.py"),
)


def pytest_configure() -> None:
    """Programs under test hear signals that whoever started us ignores, as nohup and a script's `&` do.

    We go on ignoring them, by a handler: other than SIG_IGN, that is not inherited.
    """
    for number in (signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def scope_of(nodeid: str) -> str:
    """What one process runs as a whole: a file; all of e2e, whose homes are made once then."""
    file = nodeid.partition("::")[0]
    return "tests/e2e" if file.startswith("tests/e2e/") else file


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a process that is one of several: the longest first."""
    if hasattr(config, "workerinput"):
        items.sort(
            key=lambda item: LONGEST.index(scope) if (scope := scope_of(item.nodeid)) in LONGEST else 99
        )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out files in the order they were collected; `--dist loadfile` begins with those of most tests."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    if config.getoption("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False
    return Scheduler(config, log)


class VersionMaker:
    """Publishes versions of the bundled model into any store; the model is loaded once."""

    def __init__(self) -> None:
        import open_clip

        from dynlora.clip import BUNDLED_CONFIG, BUNDLED_WEIGHTS

        self.architecture = BUNDLED_CONFIG.stem
        open_clip.add_model_config(str(BUNDLED_CONFIG))
        self.model = open_clip.create_model(
            self.architecture, pretrained=str(BUNDLED_WEIGHTS), precision="fp32"
        ).eval()
        self.tokenizer = open_clip.get_tokenizer(self.architecture)
        self.model_cfg = open_clip.get_model_config(self.architecture)
        self.preprocess_cfg = open_clip.get_model_preprocess_cfg(self.model)
        self.image_size: tuple[int, int] = self.model.visual.image_size
        self.context_length: int = self.model.context_length
        self.bundled = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self._static: dict[str, bytes] = {}  # what was exported once

    def write_static_files(self, directory: Path) -> None:
        """Write what all versions share: graphs, preprocessing, tokenizer, open_clip's config."""
        if not self._static:
            self._make_static_files(directory)
            self._static = {path.name: path.read_bytes() for path in directory.iterdir()}
        for name, content in self._static.items():
            (directory / name).write_bytes(content)

    def _make_static_files(self, directory: Path) -> None:
        from deploy.export import export_graphs
        from deploy.preprocess import Preprocessing
        from deploy.tokenize import build_tokenizer_json

        export_graphs(self.model, directory, context_length=self.context_length, image_size=self.image_size)
        Preprocessing.from_open_clip_cfg(self.preprocess_cfg).save(directory / "preprocessor_config.json")
        ranks = self.tokenizer.bpe_ranks
        text = build_tokenizer_json(
            self.tokenizer.encoder, sorted(ranks, key=ranks.__getitem__), self.context_length
        )
        (directory / "tokenizer.json").write_text(text, encoding="utf-8")
        config = {"model_cfg": self.model_cfg, "preprocess_cfg": self.preprocess_cfg}
        (directory / "open_clip_config.json").write_text(json.dumps(config))

    def write_class_files(self, directory: Path, class_names: tuple[str, ...]) -> None:
        """Write class list and embeddings, and reference.npz, from the weights that the model now has."""
        import torch

        from deploy.export import REFERENCE_TEXTS, reference_outputs
        from deploy.manifest import ClassEntry, ClassesFile, class_key, save_classes

        entries = [ClassEntry(name=name, key=class_key(name), template=TEMPLATE) for name in class_names]
        save_classes(directory, ClassesFile(classes=tuple(entries)))
        with torch.no_grad():
            prompts = self.tokenizer([TEMPLATE.format(name) for name in class_names])
            embeddings = self.model.encode_text(prompts, normalize=True).numpy()
        np.save(directory / "class_embeddings.npy", embeddings)
        input_ids = self.tokenizer(list(REFERENCE_TEXTS)).numpy()
        reference_outputs(self.model, directory, input_ids=input_ids, image_size=self.image_size)

    def manifest(self, staging: Path, **fields: Any) -> Any:
        """Return a manifest of what lies in ``staging``."""
        from deploy.manifest import Manifest, record_files

        return Manifest(
            architecture=self.architecture,
            embed_dim=self.model_cfg["embed_dim"],
            context_length=self.context_length,
            logit_scale=self.model.logit_scale.exp().item(),
            files=record_files(staging),
            **fields,
        )

    def publish_first(self, serving_dir: Path, class_names: tuple[str, ...] = CLASS_NAMES) -> Path:
        """Publish version 0 into a new store and return its directory."""
        from deploy.export import state_arrays
        from deploy.store import VersionStore
        from deploy.weights import write_weights

        self.model.load_state_dict(self.bundled)  # another version may have left others
        store = VersionStore(serving_dir)
        store.create()
        staging = store.stage("initial")
        self.write_static_files(staging)
        write_weights(staging / "weights.safetensors", state_arrays(self.model))
        self.write_class_files(staging, class_names)
        return store.path(store.publish(staging, self.manifest(staging, version=0, kind="initial")))

    def random_delta(self, seed: int, *, rank: int = 2, scale: float = 0.02) -> Any:
        """Return a small random update of one image and one text matrix, k rows of attention included."""
        from deploy.delta import Delta, Factor

        rng = np.random.default_rng(seed)
        shapes = {key: tuple(value.shape) for key, value in self.model.state_dict().items()}

        def factor(key: str, start: int, stop: int) -> Factor:
            parts = ((stop - start, rank), (rank, shapes[key][1]), (rank,))
            return Factor(
                key, start, stop, *(scale**0.5 * rng.standard_normal(s).astype(np.float32) for s in parts)
            )

        text = "transformer.resblocks.2.mlp.c_fc.weight"
        fused = max(  # several square matrices above each other
            (
                k
                for k, s in shapes.items()
                if "visual." in k and ".attn." in k and len(s) == 2 and s[0] > s[1]
            ),
            key=lambda k: shapes[k],
        )
        width = shapes[fused][1]
        return Delta([factor(fused, width, 2 * width), factor(text, 0, shapes[text][0])])

    def stage_random(self, serving_dir: Path, seed: int, *, batch: str | None = None) -> tuple[Path, Any]:
        """Stage the live version with a random delta folded in; return (staging, manifest)."""
        import torch

        from deploy.delta import fold, load_delta, save_delta
        from deploy.manifest import BatchInfo, ImageCounts, LineageEntry
        from deploy.store import VersionStore
        from deploy.weights import read_weights, write_weights

        store, batch = VersionStore(serving_dir), batch or f"{seed:06d}-random"
        live = store.live_manifest()
        staging = store.stage(batch, like=live.version)
        record = save_delta(staging / "delta.safetensors", self.random_delta(seed))
        base = read_weights(store.path(live.version) / "weights.safetensors")
        weights = fold(base, [load_delta(staging / "delta.safetensors")])
        write_weights(staging / "weights.safetensors", weights)
        self.model.load_state_dict({name: torch.from_numpy(np.array(w)) for name, w in weights.items()})
        self.write_class_files(staging, CLASS_NAMES)
        info = BatchInfo(
            id=batch,
            classes=CLASS_NAMES[:1],
            images=ImageCounts(train=8, tune=1, exam=2),
            content_sha256=record.sha256,
        )
        lineage = (*live.lineage, LineageEntry(batch=batch, delta_sha256=record.sha256))
        return staging, self.manifest(
            staging,
            version=store.next_version(),
            parent=live.version,
            kind="update",
            batch=info,
            lineage=lineage,
        )


@pytest.fixture(scope="session")
def version_maker() -> VersionMaker:
    """The bundled model and what turns it into versions. Its weights are those of the last one made."""
    return VersionMaker()


@pytest.fixture(scope="session")
def version_dir(version_maker: VersionMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a complete published version 0; read-only."""
    return version_maker.publish_first(tmp_path_factory.mktemp("store") / "serving")


@pytest.fixture
def serving_dir(version_dir: Path, tmp_path: Path) -> Path:
    """A store of one's own that holds version 0."""
    copy = tmp_path / "serving"
    shutil.copytree(version_dir.parent.parent, copy, symlinks=True)
    return copy


@pytest.fixture(scope="session")
def publish_random_version(version_maker: VersionMaker) -> Callable[[Path, int], int]:
    """A function (serving_dir, seed) that publishes one more version with a random delta; its number."""

    def publish(serving_dir: Path, seed: int) -> int:
        from deploy.store import VersionStore

        staging, manifest = version_maker.stage_random(serving_dir, seed)
        return VersionStore(serving_dir).publish(staging, manifest)

    return publish
