"""One published version, loaded: ONNX Runtime sessions, class list, preprocessing, tokenizer.

Knows nothing of `current` and of other versions (that is deploy.client). Every file that is used is
checked against the manifest while loading, and a shared lock on manifest.json tells whoever prunes
the store that this version is in use. All methods may be called from several threads at once.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deploy.arrays import read_array, read_arrays
from deploy.cpus import usable_cpus
from deploy.errors import ClientError, ImageError, VerifyError
from deploy.manifest import (
    CLASS_EMBEDDINGS_NAME,
    MANIFEST_NAME,
    PREPROCESSOR_NAME,
    REFERENCE_NAME,
    TEXT_GRAPH_NAME,
    TOKENIZER_NAME,
    VISION_GRAPH_NAME,
    Manifest,
    class_key,
    load_manifest,
)
from deploy.opening import check_used_files, hold_shared_lock, open_session, open_tokenizer
from deploy.parts import MAX_BATCH, run_in_parts
from deploy.preprocess import ImageSource, Preprocessing, decode_image
from deploy.signing import TrustedKeys
from deploy.unknown import BACKGROUND, choose_background, rows_beside, unknown_scores
from deploy.verify import PARITY_TOLERANCE, check_embeddings

DEFAULT_TEMPLATE = "a photo of a {}."
DEFAULT_TOP = 5

_MAX_REMEMBERED_LABELS = 4096  # at 512 dimensions 8 MB

_MAX_REMEMBERED_SIZES = 4
_WARM_UP_RUNS = 2  # the first run of a shape plans its memory, the second is the first to use the plan

Aside = Callable[[Callable[[], None]], None]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


def _at_once(work: Callable[[], None]) -> None:
    work()


@dataclass(frozen=True)
class Prediction:
    """One label and its probability among the labels that were asked about."""

    label: str
    score: float


class LoadedVersion:
    """A version ready to answer.

    Args:
        directory: versions/N of a store.
        threads: ONNX Runtime threads per tower; by default the CPUs this process may use.
        runs_at_once: among how many runs the rows of one call are divided. Many rows are answered sooner by
            several runs of one thread than by one run of several.
        trust: keys, one of which must have signed the version; None: signatures are not looked at.
        aside: runs the checking of the files, for whoever wants it done in a thread of low priority.

    Raises:
        VerifyError: a file is missing, damaged, or not what the manifest records.
        ManifestError: manifest.json or classes.json cannot be used.
    """

    def __init__(
        self,
        directory: Path,
        *,
        threads: int | None = None,
        runs_at_once: int = 1,
        trust: TrustedKeys | None = None,
        aside: Aside = _at_once,
    ) -> None:
        # Resolved once: ONNX Runtime finds the weights beside the graph, and a path through `current`
        # could lead to another version between two opens.
        self.directory = directory.resolve()
        self.runs_at_once = runs_at_once
        self._lock_descriptor = hold_shared_lock(self.directory / MANIFEST_NAME)
        try:
            self.manifest: Manifest = (trust.load_manifest if trust else load_manifest)(self.directory)
            aside(lambda: check_used_files(self.directory, self.manifest))
            self._load(threads or usable_cpus())
        except BaseException:
            self.close()
            raise

    def _load(self, threads: int) -> None:
        classes = check_embeddings(self.directory, embed_dim=self.manifest.embed_dim)
        self.class_embeddings: Float32 = read_array(self.directory / CLASS_EMBEDDINGS_NAME)
        self.class_embeddings.flags.writeable = False
        self.class_names: tuple[str, ...] = tuple(entry.name for entry in classes)
        self._rows = {entry.key: row for row, entry in enumerate(classes)}
        self.preprocessing = Preprocessing.load(self.directory / PREPROCESSOR_NAME)
        self._tokenizer = open_tokenizer(
            self.directory / TOKENIZER_NAME, self.manifest.files[TOKENIZER_NAME].sha256
        )
        self._vision: Any = open_session(self.directory / VISION_GRAPH_NAME, threads)
        self._text: Any = open_session(self.directory / TEXT_GRAPH_NAME, threads)
        self._label_embeddings: OrderedDict[str, Float32] = OrderedDict()
        self._label_lock = threading.Lock()
        self._batch_sizes: OrderedDict[int, None] = OrderedDict()
        self._background: Float32 | None = None

    @property
    def version(self) -> int:
        """The version's number."""
        return self.manifest.version

    @property
    def vocabulary_size(self) -> int:
        """Token ids are below this number."""
        return self._tokenizer.vocabulary_size

    def close(self) -> None:
        """Free the sessions and let go of the lock; no method may be running or called after."""
        self._vision = self._text = None
        if self._lock_descriptor is not None:
            os.close(self._lock_descriptor)
            self._lock_descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def encode_pixels(self, pixel_values: Float32) -> Float32:
        """Return L2-normalised embeddings (N, dim) of preprocessed pixels (N, 3, H, W)."""
        self._remember_size(min(len(pixel_values), MAX_BATCH))
        return self._run(self._vision, "image_embeds", {"pixel_values": pixel_values})

    def encode_images(self, images: Sequence[ImageSource]) -> Float32:
        """Return L2-normalised embeddings (N, dim) of N pictures (paths, bytes or Pillow images).

        Raises:
            ImageError: one cannot be used; says which.
            ClientError: this is one picture, not a list of them.
        """
        expect_list(images, "pictures")
        embeddings = np.empty((len(images), self.manifest.embed_dim), np.float32)
        for start in range(0, len(images), MAX_BATCH):
            part = range(start, min(start + MAX_BATCH, len(images)))
            decoded = [_decode(images[index], index, len(images)) for index in part]
            embeddings[part.start : part.stop] = self.encode_pixels(self.preprocessing(decoded))
        return embeddings

    def encode_texts(self, texts: Sequence[str]) -> Float32:
        """Return L2-normalised embeddings (N, dim) of N texts, each cut to the context length.

        Raises:
            ClientError: this is one text, not a list of them.
        """
        expect_list(texts, "texts")
        return self._run(self._text, "text_embeds", {"input_ids": self._tokenizer(texts)})

    def encode_ids(self, input_ids: Int64) -> Float32:
        """Return L2-normalised embeddings (N, dim) of token ids (N, context_length)."""
        return self._run(self._text, "text_embeds", {"input_ids": input_ids})

    def tokenize(self, texts: Sequence[str]) -> Int64:
        """Return token ids (N, context_length) of N texts, each cut to the context length."""
        return self._tokenizer(texts)

    def embed_classes(self, names: Sequence[str], templates: Sequence[str] | str) -> Float32:
        """Return (N, dim): each name in its template (or the one template), as classes.json has them.

        Raises:
            ClientError: a template has not exactly one `{}`.
        """
        per_name = [templates] * len(names) if isinstance(templates, str) else templates
        for template in per_name:
            if template.count("{}") != 1:
                raise ClientError(f"a template has one {{}} where the class name goes, found {template!r}")
        return self.encode_texts(
            [template.replace("{}", name) for template, name in zip(per_name, names, strict=True)]
        )

    def classify(
        self,
        images: Sequence[ImageSource],
        labels: Sequence[str] | None = None,
        *,
        top: int = DEFAULT_TOP,
    ) -> list[list[Prediction]]:
        """Return the best labels of each picture, the likeliest first.

        Args:
            labels: what to choose from; by default the classes this version knows. A known class keeps
                the template it was learnt with, any other label is put into DEFAULT_TEMPLATE.
            top: how many to return at most.

        Raises:
            ClientError: there is nothing to choose from.
            ImageError: a picture cannot be used.
        """
        return self.rank(self.encode_images(images), labels, top=top)

    def rank(
        self, image_embeds: Float32, labels: Sequence[str] | None = None, *, top: int = DEFAULT_TOP
    ) -> list[list[Prediction]]:
        """Return the best labels of each of N pictures, given their embeddings (N, dim); as ``classify``.

        Raises:
            ClientError: there is nothing to choose from.
        """
        names, rows = self._choices(labels)
        logits = self.score_scale * (image_embeds @ rows.T)
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
        order = np.argsort(-scores, axis=1, kind="stable")[:, : max(1, top)]
        return [
            [Prediction(names[index], float(row[index])) for index in best]
            for best, row in zip(order, scores, strict=True)
        ]

    def unknown(self, image_embeds: Float32, labels: Sequence[str] | None = None) -> list[float]:
        """Return how unlike all labels each of N pictures (N, dim) is, from 0 to 1; see deploy.unknown.

        Args:
            labels: as for ``classify``.

        Raises:
            ClientError: there are no labels, or they name all of the background.
        """
        names, rows = self._choices(labels)
        left = rows_beside([class_key(name) for name in names])
        if not left:
            raise ClientError(
                f"there is no unknown score: the labels name all {len(BACKGROUND)} things that pictures "
                "are compared with besides (deploy.unknown.BACKGROUND); ask with fewer labels, or without "
                "`unknown`"
            )
        beside = self._background_embeddings()[left]
        chosen = beside[choose_background(rows, beside)]
        scale = self.score_scale
        return unknown_scores(scale * (image_embeds @ rows.T), scale * (image_embeds @ chosen.T))

    @property
    def score_scale(self) -> float:
        """What cosines are multiplied by before the softmax: logit_scale, divided by the temperature."""
        return self.manifest.logit_scale / (self.manifest.temperature or 1.0)

    @property
    def knows_background(self) -> bool:
        """Whether unknown scores have been asked for: their background is embedded then."""
        return self._background is not None

    def _background_embeddings(self) -> Float32:
        if self._background is None:  # two threads may both embed it, to the same values
            self._background = self.embed_classes(BACKGROUND, DEFAULT_TEMPLATE)
        return self._background

    def check_parity(self, tolerance: float = PARITY_TOLERANCE) -> float:
        """Return the largest |difference| to torch's outputs in reference.npz, over both towers.

        Raises:
            VerifyError: it is above the tolerance, or the file cannot be used.
        """
        return max(self.measure_parity(tolerance).values())

    def measure_parity(self, tolerance: float = PARITY_TOLERANCE) -> dict[str, float]:
        """Return the largest |difference| to torch's outputs in reference.npz for each tower.

        Raises:
            VerifyError: one is above the tolerance, or the file cannot be used.
        """
        path = self.directory / REFERENCE_NAME
        try:
            arrays = read_arrays(path)
            vision = self._run(self._vision, "image_embeds", {"pixel_values": arrays["pixel_values"]})
            vision = vision - arrays["image_embeds"]
            text = self._run(self._text, "text_embeds", {"input_ids": arrays["input_ids"]})
            text = text - arrays["text_embeds"]
            parity = {"vision": float(np.abs(vision).max()), "text": float(np.abs(text).max())}
        except Exception as error:  # a damaged archive and ONNX Runtime raise whatever they like
            raise VerifyError(f"{path} cannot be used to check version {self.version}: {error}") from error
        for difference in parity.values():
            if not difference <= tolerance:  # so that a NaN fails too
                raise VerifyError(
                    f"version {self.version} computes other embeddings here than torch did: they differ by "
                    f"{difference:.3g}, expected at most {tolerance:.3g} ({path})"
                )
        return parity

    def warm_up(
        self, batch_sizes: Iterable[int] = (1,), labels: Sequence[str] = (), *, background: bool = False
    ) -> None:
        """Do the work that the first requests would wait for: batches of these sizes, these labels.

        Args:
            background: embed that of the unknown scores as well.
        """
        height, width = self.preprocessing.size
        for size in batch_sizes:
            for _ in range(_WARM_UP_RUNS):
                self.encode_pixels(np.zeros((size, 3, height, width), np.float32))
        self._embed_labels(labels)
        if background:
            self._background_embeddings()

    def remembered_batch_sizes(self) -> list[int]:
        """Return the sizes of the batches of pictures that were asked about lately."""
        with self._label_lock:
            return list(self._batch_sizes)

    def _remember_size(self, size: int) -> None:
        with self._label_lock:
            self._batch_sizes[size] = None
            self._batch_sizes.move_to_end(size)
            while len(self._batch_sizes) > _MAX_REMEMBERED_SIZES:
                self._batch_sizes.popitem(last=False)

    def remembered_labels(self) -> list[str]:
        """Return the labels asked about lately that are not classes of this version."""
        with self._label_lock:
            return list(self._label_embeddings)

    def _choices(self, labels: Sequence[str] | None) -> tuple[Sequence[str], Float32]:
        """Return the names to choose from and their embeddings (names, dim)."""
        if labels is None:
            if not self.class_names:
                raise ClientError(
                    f"version {self.version} knows no classes yet: pass labels, or drop a class folder first"
                )
            return self.class_names, self.class_embeddings
        expect_list(labels, "labels")
        if not labels:
            raise ClientError("there is nothing to choose from: the list of labels is empty")
        return labels, self._embed_labels(labels)

    def _embed_labels(self, labels: Sequence[str]) -> Float32:
        """Return (labels, dim), computing only what is neither a class nor remembered."""
        rows = [self._rows.get(class_key(label)) for label in labels]
        with self._label_lock:
            known = {label: self._label_embeddings.get(label) for label in labels}
        unknown = [label for label, row in zip(labels, rows, strict=True) if row is None]
        missing = [label for label in dict.fromkeys(unknown) if known[label] is None]
        known.update(zip(missing, self.embed_classes(missing, DEFAULT_TEMPLATE), strict=True))
        with self._label_lock:
            for label in dict.fromkeys(unknown):
                self._label_embeddings[label] = known[label]  # type: ignore[assignment]
                self._label_embeddings.move_to_end(label)
            while len(self._label_embeddings) > _MAX_REMEMBERED_LABELS:
                self._label_embeddings.popitem(last=False)
        return np.array(
            [known[label] if row is None else self.class_embeddings[row]
             for label, row in zip(labels, rows, strict=True)],
            np.float32,
        ).reshape(len(labels), self.manifest.embed_dim)  # fmt: skip

    def _run(self, session: Any, output: str, inputs: dict[str, Float32 | Int64]) -> Float32:
        ((name, rows),) = inputs.items()

        def run(part: Float32 | Int64) -> Float32:
            answer: Float32 = session.run([output], {name: part})[0]
            return answer

        return run_in_parts(run, rows, self.manifest.embed_dim, at_once=self.runs_at_once)


def expect_list(values: Any, what: str) -> None:
    """Refuse what could be iterated over, but is a single one.

    Raises:
        ClientError: says what to do.
    """
    if isinstance(values, str | bytes | os.PathLike | Image.Image):
        raise ClientError(f"expected a list of {what}, found a single {type(values).__name__}: put it in [ ]")


def _decode(source: ImageSource, index: int, count: int) -> Any:
    try:
        return decode_image(source)
    except ImageError as error:
        if count == 1:
            raise
        raise ImageError(f"image {index + 1} of {count}: {error.reason}") from error
