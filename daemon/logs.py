"""Log lines for operators: `time level event key=value …`, one line per thing that happened."""

import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

LOGGER_NAME = "dynlora"


class KeyValueFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO published batch=000002-cups version=2`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; values with spaces or quotes are written as JSON strings."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = f"{moment.removesuffix('+00:00')}Z {record.levelname} {record.getMessage()}"
        fields: dict[str, Any] = getattr(record, "fields", {})
        line += "".join(f" {key}={_value(value)}" for key, value in fields.items() if value is not None)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def log(event: str, *, level: int = logging.INFO, exc_info: bool = False, **fields: Any) -> None:
    """Write one line. `event` is one or two words; what it is about goes into fields."""
    logging.getLogger(LOGGER_NAME).log(level, event, extra={"fields": fields}, exc_info=exc_info)


def configure(handler: logging.Handler, level: str = "INFO") -> Callable[[], None]:
    """Send our lines through `handler`; returns a function that undoes it."""
    handler.setFormatter(KeyValueFormatter())
    logger = logging.getLogger(LOGGER_NAME)
    before = (logger.level, logger.propagate)
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False

    def undo() -> None:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before

    return undo


def set_level(level: str) -> None:
    """Say more or less from now on."""
    logging.getLogger(LOGGER_NAME).setLevel(level.upper())


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    is_plain = text.isprintable() and not set(text) & set(' "=') and text
    return text if is_plain or not isinstance(value, str) else json.dumps(text, ensure_ascii=False)
