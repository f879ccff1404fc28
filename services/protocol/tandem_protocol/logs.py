"""Log lines of both services: readable text, or one JSON object per line with `TANDEM_LOG=json`.

    2026-11-25 14:03:22 INFO     step 42/200  reward 0.512  …
    {"time": "2026-11-25T14:03:22.104Z", "level": "info", "logger": "tandem_trainer.run.journal", "message": "step 42…"}

Times are UTC in JSON, and the machine's local time in text. An exception that nothing catches is a record, too.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from .config import ConfigError
from .secrets import mask

log = logging.getLogger(__name__)

LOG_ENV = "TANDEM_LOG"
TEXT, JSON = "text", "json"
FIELDS = "tandem_fields"
"""Attribute of a log record with further fields for JSON. Pass it as `extra=fields(step=42)`."""
EVENT = "event"
"""Name of the field with the kind of an event: the trainer writes such a record to `events.jsonl`, too."""
EVENTS = logging.getLogger("tandem_events")
"""Logger of events that the log says now and then only. The trainer listens to it; it writes nothing itself."""
EVENTS.propagate = False
EVENTS.setLevel(logging.INFO)
EVENTS.addHandler(logging.NullHandler())
BUG = "unexpected error: %s: %s; this is a bug in Tandem or its libraries: please report it with this log"
"""The message of an exception that nothing catches: its type, and its own message in one line."""

_TEXT_FORMAT = "%(asctime)s %(levelname)-8s %(message)s"
_TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
_REPORTERS = ("asyncio", "concurrent.futures", "uvicorn.error")
"""Loggers of libraries that report exceptions which nothing catches, such as that of a task that is not awaited."""


def configure(env: Mapping[str, str] = os.environ, *, level: int = logging.INFO) -> None:
    """Send log records to stdout, and those from WARNING on to stderr, in the format that `TANDEM_LOG` names.

    Libraries are logged from WARNING on, Tandem's own packages from `level` on. Python warnings and exceptions that
    nothing catches become log records.

    Raises:
        ConfigError: `TANDEM_LOG` is neither `text` nor `json`. Records are text then.
    """
    formatter = make_formatter({})
    try:
        formatter = make_formatter(env)
    finally:
        logging.basicConfig(level=logging.WARNING, handlers=handlers(formatter), force=True)
        for package in ("tandem_generator", "tandem_protocol", "tandem_rollout", "tandem_trainer"):
            logging.getLogger(package).setLevel(level)
        _catch_the_rest()


def handlers(formatter: logging.Formatter) -> tuple[logging.Handler, logging.Handler]:
    """Return a handler for stdout, and one for stderr, which gets records from WARNING on."""
    progress = logging.StreamHandler(sys.stdout)
    progress.addFilter(lambda record: record.levelno < logging.WARNING)
    problems = logging.StreamHandler(sys.stderr)
    problems.setLevel(logging.WARNING)
    for handler in (progress, problems):
        handler.setFormatter(formatter)
    return progress, problems


def _catch_the_rest() -> None:
    """Make log records of warnings, and of exceptions that nothing catches, in any thread or task."""
    logging.captureWarnings(True)
    warnings.formatwarning = _one_line_warning
    sys.excepthook = _unexpected
    sys.unraisablehook = lambda args: _unexpected(args.exc_type, args.exc_value, args.exc_traceback)
    threading.excepthook = lambda args: _unexpected(args.exc_type, args.exc_value, args.exc_traceback)
    for name in _REPORTERS:
        logging.getLogger(name).addFilter(_as_bug)


def adopt(*libraries: str) -> None:
    """Have loggers of libraries that write lines in formats of their own use ours. Call it after their import."""
    for name in libraries:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def _unexpected(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt | SystemExit):  # Ctrl-C; in a thread, SystemExit ends only the thread
        return
    error = error or kind()
    log.critical(BUG, *_described(error), exc_info=(kind, error, traceback))


def _as_bug(record: logging.LogRecord) -> bool:
    """Filter that keeps every record, and says about those with an exception what `_unexpected` says."""
    if record.exc_info and record.exc_info[1]:
        record.msg, record.args = BUG, _described(record.exc_info[1])
    return True


def _described(error: BaseException) -> tuple[str, str]:
    return type(error).__name__, " ".join(str(error).split())


def _one_line_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,  # noqa: ARG001 - part of the signature of warnings.formatwarning
) -> str:
    return f"{category.__name__}: {' '.join(str(message).split())} ({filename}:{lineno})"


def report_error(error: Exception | str) -> None:
    """Log the error that ends this process, without a traceback."""
    log.error("%s", error)


def make_formatter(env: Mapping[str, str] = os.environ) -> logging.Formatter:
    """The formatter that `TANDEM_LOG` names; text by default.

    Raises:
        ConfigError: it names another one.
    """
    name = env.get(LOG_ENV) or TEXT
    if name == JSON:
        return JsonFormatter()
    if name == TEXT:
        return TextFormatter(_TEXT_FORMAT, _TIME_FORMAT)
    raise ConfigError(f"got {LOG_ENV}={name}, expected {TEXT} or {JSON}")


def fields(**values: Any) -> dict[str, Any]:
    """`extra=` of a log call: fields that a JSON line has besides the message."""
    return {FIELDS: values}


def event(kind: str, **values: Any) -> dict[str, Any]:
    """`extra=` of a log call about something that belongs into the run's `events.jsonl`: its kind, and fields."""
    return fields(**{EVENT: kind} | values)


class TextFormatter(logging.Formatter):
    """One line per record, followed by the traceback if any. Secrets are masked."""

    def format(self, record: logging.LogRecord) -> str:
        return mask(super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time, level, logger, message, the fields of `extra`, and the exception if any.

    Secrets are masked.
    """

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info and record.exc_info[0]:
            line["exception"] = record.exc_info[0].__name__
            line["traceback"] = self.formatException(record.exc_info)
        return mask(json.dumps(line, default=str))
