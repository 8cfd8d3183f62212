"""Log lines for operators: one line per thing that happened, what it is about in fields.

plain     2026-01-31T12:00:00.123Z INFO published batch=000002-cups version=2     (a terminal, a file)
journal   <6>published batch=000002-cups version=2      (systemd's journal, which keeps time and priority)
json      {"at": "2026-01-31T12:00:00.123Z", "level": "info", "event": "published", …}
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import IO, Any, Literal

LOGGER_NAME = "dynlora"
Form = Literal["auto", "plain", "journal", "json"]
# sd-daemon(3): syslog priorities before a line.
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
_standing: dict[str, Any] = {}  # fields of every line, such as the live version


class KeyValueFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO published batch=000002-cups version=2`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; values with spaces or quotes are written as JSON strings."""
        line = f"{_moment(record)} {record.levelname} {_words(record)}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JournalFormatter(logging.Formatter):
    """`<6>published batch=000002-cups version=2`: the journal adds the time, and hides the priority."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, or several of one priority where there is a traceback."""
        text = _words(record)
        if record.exc_info:
            text += f"\n{self.formatException(record.exc_info)}"
        priority = _PRIORITIES.get(record.levelno, 6)
        return "\n".join(f"<{priority}>{line}" for line in text.splitlines())


class JsonFormatter(logging.Formatter):
    """One JSON object per line, for programs that collect logs."""

    def format(self, record: logging.LogRecord) -> str:
        """`at`, `level` and `event` first; a field of one of these names gives way."""
        head = {"at": _moment(record), "level": record.levelname.lower(), "event": record.getMessage()}
        entry = head | {key: value for key, value in _fields(record).items() if key not in head}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


_FORMATTERS: dict[str, type[logging.Formatter]] = {
    "plain": KeyValueFormatter,
    "journal": JournalFormatter,
    "json": JsonFormatter,
}


def log(event: str, *, level: int = logging.INFO, exc_info: bool = False, **fields: Any) -> None:
    """Write one line. `event` is one or two words; what it is about goes into fields."""
    told = fields | {key: value for key, value in _standing.items() if key not in fields}
    logging.getLogger(LOGGER_NAME).log(level, event, extra={"fields": told}, exc_info=exc_info)


def stand(**fields: Any) -> None:
    """From now on every line has these fields, unless it says otherwise itself; None takes one away."""
    _standing.update(fields)


def form_for(stream: IO[str], environ: Mapping[str, str] = os.environ) -> Form:
    """`journal` where systemd reads the stream itself, else `plain`."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return "plain"
    return "journal" if environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}" else "plain"


def configure(handler: logging.Handler, level: str = "INFO", form: Form = "auto") -> Callable[[], None]:
    """Send our lines through `handler`; returns a function that undoes it."""
    form = form_for(sys.stderr) if form == "auto" else form
    handler.setFormatter(_FORMATTERS[form]())
    logger = logging.getLogger(LOGGER_NAME)
    before = (logger.level, logger.propagate)
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False

    def undo() -> None:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
        _standing.clear()

    return undo


def set_level(level: str) -> None:
    """Say more or less from now on."""
    logging.getLogger(LOGGER_NAME).setLevel(level.upper())


def _moment(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    return f"{moment.removesuffix('+00:00')}Z"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    return {key: value for key, value in fields.items() if value is not None}


def _words(record: logging.LogRecord) -> str:
    fields = "".join(f" {key}={_value(value)}" for key, value in _fields(record).items())
    return f"{record.getMessage()}{fields}"


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    is_plain = text.isprintable() and not set(text) & set(' "=') and text
    return text if is_plain or not isinstance(value, str) else json.dumps(text, ensure_ascii=False)
