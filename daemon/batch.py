"""The record of one batch: what came, what is learnt from it, what was set aside and why.

batch.json is this model. It is written once by intake and after that only gains attempts, a held or failed
outcome never changes what it says about the images.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from daemon.errors import BatchError

Split = Literal["train", "tune", "exam"]
Kind = Literal["folders", "batch", "archive"]
BATCH_FILE = "batch.json"
_SLUG_LENGTH = 40
MOST_TOLD = 20  # sentences about one batch, before it is enough to say how many more there are


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BatchClass(_Record):
    """One class: `name` as people see it, `key` as it is compared, `folder` under images/."""

    name: str
    key: str
    template: str  # with one {}
    folder: str
    is_new: bool  # neither live nor on its way when the batch was taken in


class BatchImage(_Record):
    """One usable image: `file` relative to the batch directory, `origin` where it lay in the drop."""

    file: str
    origin: str
    class_key: str
    sha256: str
    width: int  # pixels, after EXIF rotation
    height: int
    split: Split


class SetAside(_Record):
    """A file or folder that is not learnt from: kept, at `file` relative to the batch directory."""

    file: str
    reason: str

    @property
    def sentence(self) -> str:
        """For people: the file as its sender knows it, and why."""
        shown = re.sub(r"^(source|unpacked-[0-9]+)/(submit-[0-9a-f]{8}/)?", "", self.file)
        # A name may hold line breaks and codes that steer a terminal.
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)
        return f"{shown} was set aside: {self.reason}"


class Attempt(_Record):
    """One try at learning the batch; `outcome` is None while it runs or when it was cut short.

    step: how far the checkpoint of an interrupted one had come.
    """

    n: int
    started_at: str
    outcome: str | None = None
    step: int | None = None


class Forgotten(_Record):
    """The images of the batch were removed everywhere, on whose word and why; `at` UTC, ISO 8601."""

    who: str
    why: str
    at: str


class Batch(_Record):
    """batch.json."""

    format: Literal[1] = 1
    id: str  # <seq>-<slug>
    seq: int
    slug: str
    kind: Kind
    producer_id: str | None = None  # the producer's own key: the same one is never learnt twice
    submitter: str | None = None
    received_at: str  # UTC, ISO 8601
    content_sha256: str  # of the usable images and their classes
    classes: list[BatchClass]
    images: list[BatchImage]
    set_aside: list[SetAside] = []
    warnings: list[str] = []
    attempts: list[Attempt] = []
    duplicate_of: str | None = None  # the batch that brought the same before: not learnt again
    forgotten: Forgotten | None = None

    def count(self, split: Split) -> int:
        """Images in one split."""
        return sum(image.split == split for image in self.images)

    def split(self, split: Split) -> list[BatchImage]:
        """The images of one split."""
        return [image for image in self.images if image.split == split]

    def with_attempt(self, started_at: str) -> Self:
        """The record with one more attempt begun."""
        attempt = Attempt(n=len(self.attempts) + 1, started_at=started_at)
        return self.model_copy(update={"attempts": [*self.attempts, attempt]})

    def with_outcome(self, outcome: str, *, step: int | None = None) -> Self:
        """The record with the last attempt's outcome filled in."""
        assert self.attempts, "an outcome belongs to an attempt"
        last = self.attempts[-1].model_copy(update={"outcome": outcome, "step": step})
        return self.model_copy(update={"attempts": [*self.attempts[:-1], last]})

    def as_forgotten(self, forgotten: Forgotten) -> Self:
        """The record without any name that its sender gave a file. Hashes and class names stay."""
        images = [image.model_copy(update={"origin": ""}) for image in self.images]
        gone: dict[str, object] = {"images": images, "set_aside": [], "warnings": [], "forgotten": forgotten}
        return self.model_copy(update=gone)

    def to_json(self) -> str:
        """The content of batch.json."""
        return self.model_dump_json(indent=1) + "\n"


def read_batch(directory: Path) -> Batch:
    """The record in `directory`.

    Raises:
        BatchError: it is missing or damaged.
    """
    path = directory / BATCH_FILE
    try:
        return Batch.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise BatchError(f"{path} is missing; the batch cannot be used without it") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BatchError(f"{path} is damaged: {where}: {first['msg']}; drop the images again") from error


def the_first(sentences: Sequence[str], record: Path | str) -> list[str]:
    """The first MOST_TOLD of these, and how many more can be read in `record`."""
    more = len(sentences) - MOST_TOLD
    told = list(sentences[:MOST_TOLD])
    return [*told, f"{more} more sentences like these are in {record}"] if more > 0 else told


def why_not_after_held(producer_id: str | None, twin: str) -> str:
    """Why a batch is not learnt that has the producer's id of one that was held, and what to do."""
    return (
        f"its id {producer_id!r} is that of {twin}, which was held and not published; "
        "give it another id to have it tried again"
    )


def batch_id(seq: int, slug: str) -> str:
    """`<seq>-<slug>`, padded so that a listing sorts in working order."""
    return f"{seq:06d}-{slug}"


def sequence(identifier: str) -> int | None:
    """The seq of a batch id, or None when it is not one."""
    number, _, rest = identifier.partition("-")
    is_id = number.isascii() and number.isdigit() and rest and "\n" not in rest
    return int(number) if is_id else None


def slug(names: Iterable[str]) -> str:
    """A short name of letters, digits and hyphens that is safe in any path, such as `dress-and-2-more`."""
    words = [plain_name(name) for name in names]
    first = next((word for word in words if word), "batch")[:_SLUG_LENGTH].rstrip("-")
    return first if len(words) < 2 else f"{first}-and-{len(words) - 1}-more"


def plain_name(name: str) -> str:
    """ASCII letters, digits and hyphens only; empty where nothing is left."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode("ascii")
    return re.sub(r"[^a-z0-9]+", "-", ascii_name.lower()).strip("-")


def content_sha256(pairs: Iterable[tuple[str, str]]) -> str:
    """The identity of a batch's content: (class key, image sha256) pairs in any order."""
    digest = hashlib.sha256()
    for key, image in sorted(set(pairs)):
        digest.update(f"{image} {key}\n".encode())
    return digest.hexdigest()
