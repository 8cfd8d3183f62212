"""The same versions as an NVIDIA Triton model repository: two models, one for each tower.

    <repository>/<prefix>_vision/
      config.pbtxt
      12/                         the same number as here; Triton reads `0` too, and no other leading zero
        model.onnx/model.onnx     the graph, and beside it
        model.onnx/weights.safetensors
        classes.json  class_embeddings.npy  manifest.json  preprocessor_config.json

A version arrives in `.tmp-12`: Triton ignores names that do not begin with a number. Classes lie inside the
version, because config.pbtxt is shared by all of them, and old embeddings with new names would be wrong.
Served are the live version and the newest one before it, by name in `version_policy`: a request without a
version gets the highest number, so after a roll-back nothing newer may be left to Triton.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy import atomic, disk
from deploy.copying import copy_file
from deploy.errors import ShareError
from deploy.manifest import (
    CLASS_EMBEDDINGS_NAME,
    CLASSES_NAME,
    MANIFEST_NAME,
    PREPROCESSOR_NAME,
    TEXT_GRAPH_NAME,
    TOKENIZER_NAME,
    VISION_GRAPH_NAME,
    WEIGHTS_NAME,
    Manifest,
    file_record,
)
from deploy.preprocess import Preprocessing
from deploy.store_reader import StoreReader

CONFIG_NAME = "config.pbtxt"
MODEL_NAME = "model.onnx"  # of the folder, and of the graph in it: so Triton wants it with external data
DEFAULT_PREFIX = "dynlora"
MAX_BATCH = 32
_TOWERS = {"vision": VISION_GRAPH_NAME, "text": TEXT_GRAPH_NAME}
_BESIDE = {
    "vision": (PREPROCESSOR_NAME, CLASSES_NAME, CLASS_EMBEDDINGS_NAME),
    "text": (TOKENIZER_NAME, CLASSES_NAME, CLASS_EMBEDDINGS_NAME),
}


@dataclass(frozen=True)
class TritonReport:
    """What one run did: which versions Triton is told to serve, which folders came and went."""

    live: int
    served: tuple[int, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    is_shared: bool  # whether the weights share their blocks with the store


class Repository:
    """A model repository that one store is published into.

    Args:
        folder: Triton's --model-repository, or a part of it; other models in it are left alone.
        prefix: the models are <prefix>_vision and <prefix>_text.

    Raises:
        ShareError: the prefix is no name for a model.
    """

    def __init__(self, folder: Path, prefix: str = DEFAULT_PREFIX) -> None:
        if not prefix.replace("_", "").replace("-", "").isalnum() or not prefix.isascii():
            raise ShareError(f"{prefix!r} is no name for a model: expected letters, digits, _ and -")
        self._folder = folder
        self.models = {tower: f"{prefix}_{tower}" for tower in _TOWERS}

    def write(self, store: StoreReader) -> TritonReport:
        """Add the versions to serve, then say so in config.pbtxt; older ones stay until `tidy`.

        Raises:
            ShareError: a file of the store is not what its manifest records.
            StoreError: the store has no live version that is whole.
            OSError: the repository cannot be written.
        """
        served = served_versions(store)
        added, is_shared = [], True
        for tower, model in self.models.items():
            atomic.make_dir(self._folder / model)
            for number in served:
                target = self._folder / model / str(number)
                if not _is_there(target, store, number, tower):
                    is_shared &= self._add(store, number, tower, target)
                    added.append(f"{model}/{number}")
            text = config_text(
                model,
                tower,
                store.manifest(served[0]),
                size=Preprocessing.load(store.path(served[0]) / PREPROCESSOR_NAME).size,
                versions=served,
            )
            path = self._folder / model / CONFIG_NAME
            # Written only when it changes: a new file makes Triton load the model anew.
            if not path.is_file() or path.read_text() != text:
                atomic.write_text(path, text)
        return TritonReport(served[0], served, tuple(added), (), is_shared)

    def tidy(self, served: tuple[int, ...]) -> tuple[str, ...]:
        """Remove version folders that are not served any more; call it once Triton has let go of them."""
        removed = []
        for model in self.models.values():
            for path in sorted((self._folder / model).iterdir()):
                is_leftover = path.name.startswith(atomic.TEMPORARY_PREFIX)
                if is_leftover or (path.name.isdecimal() and int(path.name) not in served):
                    atomic.remove_tree(path)
                    removed.append(f"{model}/{path.name}")
        return tuple(removed)

    def _add(self, store: StoreReader, number: int, tower: str, target: Path) -> bool:
        """Copy one version of one tower; tell whether its weights share their blocks with the store's."""
        source, files = store.path(number), store.manifest(number).files
        temporary = target.parent / f"{atomic.TEMPORARY_PREFIX}{number}"
        atomic.remove_tree(temporary)
        disk.make_dirs(temporary / MODEL_NAME)
        is_shared = copy_file(source / WEIGHTS_NAME, temporary / MODEL_NAME / WEIGHTS_NAME)
        copy_file(source / _TOWERS[tower], temporary / MODEL_NAME / MODEL_NAME)
        for name in (*_BESIDE[tower], MANIFEST_NAME):
            copy_file(source / name, temporary / name)
        copied = {
            WEIGHTS_NAME: temporary / MODEL_NAME / WEIGHTS_NAME,
            _TOWERS[tower]: temporary / MODEL_NAME / MODEL_NAME,
            **{name: temporary / name for name in _BESIDE[tower]},
        }
        for name, path in copied.items():
            if file_record(path) != files[name]:
                disk.remove_tree(temporary)
                raise ShareError(
                    f"{source / name} is not what its manifest records, so it is not given to Triton; "
                    f"look with `dynlora verify {number}`"
                )
        atomic.fsync_tree(temporary)
        atomic.remove_tree(target)  # damaged, or it would not be made anew
        atomic.rename(temporary, target)
        return is_shared


def served_versions(store: StoreReader) -> tuple[int, ...]:
    """Return the live version, and the newest whole one before it.

    Raises:
        StoreError: nothing is live.
    """
    live = store.current()
    older = [number for number in store.full_versions() if number < live]
    return (live, *older[-1:])


def config_text(
    model: str, tower: str, manifest: Manifest, *, size: tuple[int, int], versions: tuple[int, ...]
) -> str:
    """Return config.pbtxt of one tower.

    Args:
        size: (height, width) of the pictures in pixels.
    """
    feeds: Mapping[str, tuple[str, str, tuple[int, ...], str]] = {
        "vision": ("pixel_values", "TYPE_FP32", (3, *size), "image_embeds"),
        "text": ("input_ids", "TYPE_INT64", (manifest.context_length,), "text_embeds"),
    }
    name, kind, dims, output = feeds[tower]
    shape = ", ".join(map(str, dims))
    warmups = "".join(
        f"""
model_warmup [ {{
  name: "batch of {batch}"
  batch_size: {batch}
  inputs {{ key: "{name}" value: {{ data_type: {kind} dims: [ {shape} ] zero_data: true }} }}
}} ]"""
        for batch in (1, MAX_BATCH)
    )
    return f"""# Written by dynlora whenever a version goes live; changes are overwritten.
name: "{model}"
backend: "onnxruntime"
max_batch_size: {MAX_BATCH}
input [ {{ name: "{name}" data_type: {kind} dims: [ {shape} ] }} ]
output [ {{ name: "{output}" data_type: TYPE_FP32 dims: [ {manifest.embed_dim} ] }} ]
version_policy: {{ specific: {{ versions: [ {", ".join(map(str, versions))} ] }} }}
dynamic_batching {{ max_queue_delay_microseconds: 1000 }}{warmups}
parameters {{ key: "dynlora_live_version" value: {{ string_value: "{versions[0]}" }} }}
"""


def _is_there(target: Path, store: StoreReader, number: int, tower: str) -> bool:
    """Tell whether this very version is in the repository: it came by one rename, with its manifest.

    A store that was made anew, or restored from a copy, has other versions under the same numbers.
    """
    mine, source = target / MANIFEST_NAME, store.path(number) / MANIFEST_NAME
    if not mine.is_file() or mine.read_bytes() != source.read_bytes():
        return False
    manifest = store.manifest(number)
    places = {
        WEIGHTS_NAME: target / MODEL_NAME / WEIGHTS_NAME,
        _TOWERS[tower]: target / MODEL_NAME / MODEL_NAME,
        **{name: target / name for name in _BESIDE[tower]},
    }
    return all(
        path.is_file() and path.stat().st_size == manifest.files[name].bytes for name, path in places.items()
    )
