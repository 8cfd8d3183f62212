"""The contract of a version: manifest.json and classes.json, as pydantic models.

Knows the form of the two files, not where versions live or how they come about. Outside programs
read these files: a field changes only with a new schema number and a changelog entry.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from deploy import atomic
from deploy.errors import ManifestError

MANIFEST_NAME = "manifest.json"
CLASSES_NAME = "classes.json"
CLASS_EMBEDDINGS_NAME = "class_embeddings.npy"
VISION_GRAPH_NAME = "vision_model.onnx"
TEXT_GRAPH_NAME = "text_model.onnx"
WEIGHTS_NAME = "weights.safetensors"
DELTA_NAME = "delta.safetensors"
PREPROCESSOR_NAME = "preprocessor_config.json"
TOKENIZER_NAME = "tokenizer.json"
REFERENCE_NAME = "reference.npz"
OPEN_CLIP_CONFIG_NAME = "open_clip_config.json"
# Over manifest.json, which holds every other file's hash; so neither of the two is listed in it.
SIGNATURE_NAME = "model.sig"
UNLISTED_NAMES = (MANIFEST_NAME, SIGNATURE_NAME)

GRAPH_NAMES = (VISION_GRAPH_NAME, TEXT_GRAPH_NAME)
# What every version holds beside manifest.json; delta.safetensors comes on top from version 1 on.
REQUIRED_NAMES = (
    *GRAPH_NAMES,
    WEIGHTS_NAME,
    CLASSES_NAME,
    CLASS_EMBEDDINGS_NAME,
    PREPROCESSOR_NAME,
    TOKENIZER_NAME,
    REFERENCE_NAME,
    OPEN_CLIP_CONFIG_NAME,
)

_SHA256 = r"^[0-9a-f]{64}$"
_BLOCK_BYTES = 1 << 20
_MAX_JSON_BYTES = 64 << 20  # a hundred thousand classes need a third of it


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class FileRecord(_Model):
    """What one file of a version must be."""

    sha256: str = Field(pattern=_SHA256)
    bytes: int = Field(ge=0)


class ImageCounts(_Model):
    """How a batch's images were split: learnt from, tuned on, graded on."""

    train: int = Field(ge=0)
    tune: int = Field(ge=0)
    exam: int = Field(ge=0)


class BatchInfo(_Model):
    """The batch a version comes from."""

    id: str = Field(min_length=1)
    classes: tuple[str, ...]
    images: ImageCounts
    content_sha256: str = Field(pattern=_SHA256)
    producer_id: str | None = None


class LineageEntry(_Model):
    """One delta that is folded into a version's weights."""

    batch: str = Field(min_length=1)
    delta_sha256: str = Field(pattern=_SHA256)


class RuleResult(_Model):
    """What one rule of the gate found."""

    rule: str
    passed: bool
    detail: str


class Decision(_Model):
    """Why a version was published (or a batch held), rule by rule."""

    outcome: Literal["publish", "hold"]
    rules: tuple[RuleResult, ...]


class Manifest(_Model):
    """manifest.json: where a version comes from and what its files must be."""

    schema_number: Literal[1] = Field(default=1, alias="schema")
    version: int = Field(ge=0)
    parent: int | None = Field(default=None, ge=0)
    kind: Literal["initial", "update", "revert", "promote", "regraph"]
    batch: BatchInfo | None = None
    lineage: tuple[LineageEntry, ...] = ()
    created_at: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    operator: str | None = None
    architecture: str
    embed_dim: int = Field(gt=0)
    context_length: int = Field(gt=0)
    logit_scale: float  # factor on the cosine (already exponentiated)
    logit_bias: float | None = None
    temperature: float | None = Field(default=None, gt=0)  # calibration: scores are made from logits / this
    files: dict[str, FileRecord]
    method: dict[str, JsonValue] | None = None
    ranks: dict[str, int] | None = None
    delta_norm: float | None = None
    drift_norm: float | None = None
    metrics: dict[str, JsonValue] | None = None
    decision: Decision | None = None
    software: dict[str, str] = {}

    @model_serializer(mode="wrap")
    def _without_absent_calibration(self, to_dict: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is not there, so that releases from before it read the manifest too."""
        content: dict[str, Any] = to_dict(self)
        if content.get("temperature") is None:
            content.pop("temperature", None)
        return content

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if (self.kind == "initial") != (self.parent is None):
            raise ValueError("an initial version has no parent, and every other kind has one")
        if self.parent is not None and self.parent >= self.version:
            raise ValueError(f"parent {self.parent} must be older than version {self.version}")
        if self.kind in ("update", "promote", "revert") and self.batch is None:
            raise ValueError(f"a version of kind {self.kind!r} names its batch")
        batches = [entry.batch for entry in self.lineage]
        if len(set(batches)) != len(batches):
            raise ValueError(f"a batch is in the lineage twice: {batches}")
        return self


class ClassEntry(_Model):
    """One class the model is asked about; ``batch`` is None for names known from the start."""

    name: str = Field(min_length=1)
    key: str = Field(min_length=1)
    template: str
    batch: str | None = None

    @model_validator(mode="after")
    def _key_fits_the_name(self) -> Self:
        if self.key != class_key(self.name):
            raise ValueError(f"key of {self.name!r} must be {class_key(self.name)!r}, found {self.key!r}")
        return self


class ClassesFile(_Model):
    """classes.json: the names in the row order of class_embeddings.npy."""

    schema_number: Literal[1] = Field(default=1, alias="schema")
    classes: tuple[ClassEntry, ...]

    @model_validator(mode="after")
    def _keys_are_unique(self) -> Self:
        counts = Counter(entry.key for entry in self.classes)
        doubles = sorted(key for key, count in counts.items() if count > 1)
        if doubles:
            raise ValueError(f"classes that appear twice: {', '.join(doubles)}")
        return self


def class_key(name: str) -> str:
    """Return what makes two spellings the same class: NFC, casefold, runs of ``_ -`` as one space."""
    # Casefolding can undo a composition, and composing first can hide a letter from it: hence NFD, fold, NFC.
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())
    return re.sub(r"[\s_-]+", " ", folded).strip()


def load_manifest(directory: Path) -> Manifest:
    """Read ``directory``/manifest.json.

    Raises:
        ManifestError: it is missing, not JSON, of another schema, or has missing or unknown fields.
    """
    return _load(Manifest, directory / MANIFEST_NAME)


def parse_manifest(content: bytes, path: Path) -> Manifest:
    """Return what a manifest.json says; ``path`` is where it came from, for the message.

    Raises:
        ManifestError: it is not JSON, of another schema, or has missing or unknown fields.
    """
    return _parse(Manifest, content, path)


def save_manifest(directory: Path, manifest: Manifest, *, is_flushed: bool = True) -> None:
    """Write ``directory``/manifest.json, durably unless told otherwise."""
    _save(directory / MANIFEST_NAME, manifest, is_flushed=is_flushed)


def load_classes(directory: Path) -> ClassesFile:
    """Read ``directory``/classes.json.

    Raises:
        ManifestError: it is missing, malformed, or names a class twice.
    """
    return _load(ClassesFile, directory / CLASSES_NAME)


def save_classes(directory: Path, classes: ClassesFile) -> None:
    """Write classes.json into a staging directory, which is flushed when it is published."""
    _save(directory / CLASSES_NAME, classes, is_flushed=False)


def file_record(path: Path) -> FileRecord:
    """Read a file and return its sha256 and size."""
    block = memoryview(bytearray(_BLOCK_BYTES))  # one block for all: fresh ones would cost as much as hashing
    with path.open("rb", buffering=0) as file:
        return record_of(block[:count] for count in iter(lambda: file.readinto(block), 0))


def is_as_recorded(path: Path, record: FileRecord) -> bool:
    """Tell whether a plain file of that size and content lies there; of another size, it is not read."""
    is_plain = path.is_file() and not path.is_symlink()
    return is_plain and path.stat().st_size == record.bytes and file_record(path) == record


def record_of(pieces: Iterable[bytes | memoryview]) -> FileRecord:
    """Return the sha256 and size of the pieces put together."""
    digest, size = hashlib.sha256(), 0
    for piece in pieces:
        digest.update(piece)
        size += len(piece)
    return FileRecord(sha256=digest.hexdigest(), bytes=size)


def record_files(directory: Path) -> dict[str, FileRecord]:
    """Return a record of every file that a manifest lists of a version directory, in name order."""
    names = sorted(path.name for path in directory.iterdir() if path.name not in UNLISTED_NAMES)
    return {name: file_record(directory / name) for name in names}


ModelT = TypeVar("ModelT", bound=_Model)


def _load(model: type[ModelT], path: Path) -> ModelT:
    return _parse(model, _read_limited(path), path)


def _read_limited(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_JSON_BYTES + 1)
    except FileNotFoundError as error:
        raise ManifestError(
            f"{path} does not exist. A version always holds {path.name}: this directory is not a version, "
            "or was not copied whole."
        ) from error
    if len(content) > _MAX_JSON_BYTES:
        raise ManifestError(f"{path} cannot be used: expected at most {_MAX_JSON_BYTES} bytes, found more")
    return content


def _parse(model: type[ModelT], content: bytes, path: Path) -> ModelT:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise ManifestError(f"{path} cannot be used: {_first_problem(error)}") from error


def _first_problem(error: ValidationError) -> str:
    """Say in one line what is wrong first, and that a newer writer may be why."""
    problem = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in problem["loc"]) or "the file"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    found = repr(problem["input"])
    hint = (
        " This file was written by another dynlora: use that release to read it." if place == "schema" else ""
    )
    return f"{place}: {problem['msg']}, found {found[:80]}{more}.{hint}"


def _save(path: Path, model: _Model, *, is_flushed: bool) -> None:
    atomic.write_text(path, model.model_dump_json(by_alias=True, indent=2) + "\n", is_flushed=is_flushed)
