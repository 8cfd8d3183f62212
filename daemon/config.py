"""The configuration: one small model per section, checked as a whole.

Built once at the edge (daemon/config_sources.py) and handed down; nothing below reads a file, the environment
or a global. config.example.toml shows every key; a test keeps the two equal.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from daemon.windows import parse_window

DEFAULT_TEMPLATE = "a photo of a {}."


def check_template(template: str) -> str:
    """Raise ValueError unless the template has exactly one place for the class name."""
    if template.count("{}") != 1 or "{" in template.replace("{}", "") or "}" in template.replace("{}", ""):
        raise ValueError("expected exactly one {} where the class name goes, and no other braces")
    return template


def check_absolute(place: str) -> str:
    """Raise ValueError for a path that depends on where the daemon was started."""
    if place and "://" not in place and not place.startswith("/"):
        raise ValueError("expected an absolute path or a URL")
    return place


def check_address(text: str) -> str:
    """Raise ValueError for what cannot be asked over HTTP, or has a secret that logs would show."""
    expected = "expected http://… or https://… without a user name, blanks or special characters"
    try:
        url = urlsplit(text)
        is_usable = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError as error:  # no number for a port, say
        raise ValueError(f"{expected}: {error}") from error
    is_plain = text.isascii() and text.isprintable() and " " not in text
    if not (is_usable and is_plain and "@" not in url.netloc):
        raise ValueError(expected)
    return text


class Section(BaseModel):
    """What all sections share: no unknown keys, no silent conversions, no change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class InboxConfig(Section):
    """How drops are taken in."""

    path: str = ""  # empty: inbox/ in the home; else an existing folder, relative to this file
    settle_seconds: float = Field(5.0, ge=0)
    gather_seconds: float = Field(10.0, ge=0)
    scan_seconds: float = Field(30.0, gt=0)
    min_images_per_class: int = Field(4, ge=1)
    template: str = DEFAULT_TEMPLATE
    max_image_bytes: int = Field(50_000_000, ge=1)
    max_image_pixels: int = Field(80_000_000, ge=1, le=80_000_000)  # more is never decoded
    max_archive_bytes: int = Field(20_000_000_000, ge=1)  # unpacked
    max_archive_members: int = Field(200_000, ge=1)
    max_archive_ratio: float = Field(200.0, ge=1)  # unpacked : packed

    _template = field_validator("template")(check_template)


class LearningConfig(Section):
    """How a batch is learnt."""

    preset: Literal["default", "paper", "reference"] = "default"
    rank: int = Field(0, ge=0)  # 0: the preset's
    steps: int = Field(0, ge=0)  # 0: the preset's
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where a trial says it is faster
    memory_bytes: int = Field(0, ge=0)  # of the worker while it learns; 0: most of what it may take
    seed: int = Field(0, ge=0)  # another one gives other random numbers, all else equal
    threads: int = Field(0, ge=0)  # 0: every core this process may use
    checkpoint_seconds: float = Field(60.0, gt=0)
    stop_seconds: float = Field(60.0, gt=0)
    silent_seconds: float = Field(3600.0, gt=0)  # without a sign of progress: it hangs and is killed
    standby: bool = (
        True  # while nothing is to be learnt, a worker waits with torch imported and the live version open
    )


class ExamConfig(Section):
    """Which images are kept for grading, and what a version must show to be published."""

    fraction: float = Field(0.2, ge=0, lt=1)
    tune_fraction: float = Field(0.0, ge=0, lt=1)
    max_images_per_class: int = Field(50, ge=1)
    keep: bool = True
    min_gain: float = Field(0.01, ge=0, le=1)
    alpha: float = Field(0.01, gt=0, lt=1)

    @model_validator(mode="after")
    def _something_is_left_to_train_on(self) -> Self:
        if self.fraction + self.tune_fraction >= 1:
            raise ValueError(
                f"fraction {self.fraction} and tune_fraction {self.tune_fraction} leave nothing to train on; "
                f"expected a sum below 1"
            )
        return self


class StoreConfig(Section):
    """How many versions keep their weights."""

    keep_full: int = Field(3, ge=2)  # the live one and the one to roll back to at least


class DiskConfig(Section):
    """How much of the disk may be used; nothing is started that would go beyond."""

    reserve_bytes: int = Field(0, ge=0)  # stays free for everybody else on the file system
    max_home_bytes: int = Field(0, ge=0)  # what the whole home may take; 0: as much as there is


class RetentionConfig(Section):
    """When that is deleted which is no longer needed; 0 for exams and events: never."""

    done_days: float = Field(7.0, ge=0)
    exam_days: float = Field(0.0, ge=0)
    event_days: float = Field(0.0, ge=0)


class AttemptsConfig(Section):
    """How often a batch that fails is tried again."""

    max: int = Field(3, ge=1)
    backoff_seconds: float = Field(60.0, ge=0)


class ScheduleConfig(Section):
    """When batches may be learnt; they queue at other times."""

    windows: list[str] = []  # wall-clock times such as "mon-fri 22:00-06:00"; none: always
    max_versions_per_day: int = Field(0, ge=0)  # 0: as many as come

    @field_validator("windows")
    @classmethod
    def _are_windows(cls, windows: list[str]) -> list[str]:
        for text in windows:
            try:
                parse_window(text)
            except ValueError as error:
                raise ValueError(f"{text!r} is no window: {error}") from error
        return windows


class SigningConfig(Section):
    """Whether versions are signed when they are published."""

    key: str = ""  # a private key (PEM); empty: versions are not signed

    _key = field_validator("key")(check_absolute)


class MirrorConfig(Section):
    """Where versions are copied to after each change of the live one."""

    url: str = ""  # a folder or an object store (s3://…); empty: nowhere
    full: int = Field(0, ge=0)  # versions that keep their weights there, beside the initial one

    _url = field_validator("url")(check_absolute)


class TritonConfig(Section):
    """Which Triton server serves the same versions."""

    repository: str = ""  # its model repository; empty: none
    server: str = ""  # its HTTP address, to have models loaded; empty: nobody is told
    prefix: str = "dynlora"

    _repository = field_validator("repository")(check_absolute)


class MetricsConfig(Section):
    """Where Prometheus finds the daemon's metrics."""

    port: int = Field(0, ge=0, le=65_535)  # on 127.0.0.1; 0: none
    textfile: str = ""  # written for node_exporter; empty: none

    @field_validator("textfile")
    @classmethod
    def _is_collected(cls, path: str) -> str:
        if path and not (path.startswith("/") and path.endswith(".prom")):
            raise ValueError("expected an absolute path that ends in .prom, which node_exporter looks for")
        return path


class HooksConfig(Section):
    """Who is told what became of a batch."""

    events: list[Literal["published", "held", "failed", "duplicate", "promoted", "reverted"]] = [
        *("published", "held", "failed")
    ]
    command: list[str] = []  # program and arguments; gets the event on stdin
    webhook: str = ""  # gets the event by POST
    timeout_seconds: float = Field(30.0, gt=0, le=3600)
    tries: int = Field(3, ge=1, le=10)

    @field_validator("command")
    @classmethod
    def _names_a_program(cls, command: list[str]) -> list[str]:
        if command and not command[0].startswith("/"):
            raise ValueError("expected the program's absolute path and then each argument: a list")
        return command

    @field_validator("webhook")
    @classmethod
    def _is_an_address(cls, webhook: str) -> str:
        return check_address(webhook) if webhook else webhook


class MlflowConfig(Section):
    """Which MLflow store gets a run for each batch."""

    tracking_uri: str = ""  # a server, or a store on this machine; empty: nothing is logged
    experiment: str = Field("dynlora", min_length=1)
    timeout_seconds: float = Field(60.0, gt=0, le=3600)

    @field_validator("tracking_uri")
    @classmethod
    def _is_usable(cls, uri: str) -> str:
        if uri.startswith(("http://", "https://")):
            return check_address(uri)
        if uri and not uri.startswith(("sqlite:////", "file:///")):
            raise ValueError(
                "expected http://…, https://…, sqlite:////absolute/path or file:///absolute/path"
            )
        return uri


class LogConfig(Section):
    """What is written down."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "plain", "journal", "json"] = "auto"  # auto: journal where systemd reads it
    events_max_bytes: int = Field(10_000_000, ge=1000)


class Config(Section):
    """All sections. `Config()` is the default configuration."""

    inbox: InboxConfig = InboxConfig()
    learning: LearningConfig = LearningConfig()
    exam: ExamConfig = ExamConfig()
    store: StoreConfig = StoreConfig()
    disk: DiskConfig = DiskConfig()
    retention: RetentionConfig = RetentionConfig()
    attempts: AttemptsConfig = AttemptsConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    signing: SigningConfig = SigningConfig()
    mirror: MirrorConfig = MirrorConfig()
    triton: TritonConfig = TritonConfig()
    metrics: MetricsConfig = MetricsConfig()
    hooks: HooksConfig = HooksConfig()
    mlflow: MlflowConfig = MlflowConfig()
    log: LogConfig = LogConfig()

    def inbox_dir(self, home: Path) -> Path:
        """Where drops arrive."""
        return Path(self.inbox.path) if self.inbox.path else home / "inbox"


def valid_keys() -> Iterator[tuple[str, Any]]:
    """Every dotted key with its default."""
    return keys_of(Config())


def keys_of(config: Config) -> Iterator[tuple[str, Any]]:
    """Every dotted key with its value."""
    for section, values in config.model_dump().items():
        for key, value in values.items():
            yield f"{section}.{key}", value
