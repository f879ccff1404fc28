"""Log lines of both services: readable text, or one JSON object per line with `TANDEM_LOG=json`.

    2026-11-25 14:03:22 INFO     step 42/200  reward 0.512  …
    {"time": "2026-11-25T14:03:22.104Z", "level": "info", "logger": "tandem_trainer.run.journal", "message": "step 42…"}

Times are UTC in JSON, and the machine's local time in text.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from .config import ConfigError

log = logging.getLogger(__name__)

LOG_ENV = "TANDEM_LOG"
TEXT, JSON = "text", "json"
FIELDS = "tandem_fields"
"""Attribute of a log record with further fields for JSON. Pass it as `extra=fields(step=42)`."""

_TEXT_FORMAT = "%(asctime)s %(levelname)-8s %(message)s"
_TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


def configure(env: Mapping[str, str] = os.environ, *, level: int = logging.INFO) -> None:
    """Send log records to stdout, and those from WARNING on to stderr, in the format that `TANDEM_LOG` names.

    Libraries are logged from WARNING on, Tandem's own packages from `level` on. Python warnings become log records.

    Raises:
        ConfigError: `TANDEM_LOG` is neither `text` nor `json`.
    """
    formatter = make_formatter(env)
    progress = logging.StreamHandler(sys.stdout)
    progress.addFilter(lambda record: record.levelno < logging.WARNING)
    problems = logging.StreamHandler(sys.stderr)
    problems.setLevel(logging.WARNING)
    for handler in (progress, problems):
        handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[progress, problems], force=True)
    logging.captureWarnings(True)
    for package in ("tandem_generator", "tandem_protocol", "tandem_rollout", "tandem_trainer"):
        logging.getLogger(package).setLevel(level)


def report_error(error: Exception | str, env: Mapping[str, str] = os.environ) -> None:
    """Print the error that ends this process, without a traceback: `error: ...`, or a JSON line."""
    if env.get(LOG_ENV) == JSON:
        log.error("%s", error)
    else:
        print(f"error: {error}", file=sys.stderr)


def make_formatter(env: Mapping[str, str] = os.environ) -> logging.Formatter:
    """The formatter that `TANDEM_LOG` names; text by default.

    Raises:
        ConfigError: it names another one.
    """
    name = env.get(LOG_ENV) or TEXT
    if name == JSON:
        return JsonFormatter()
    if name == TEXT:
        return logging.Formatter(_TEXT_FORMAT, _TIME_FORMAT)
    raise ConfigError(f"got {LOG_ENV}={name}, expected {TEXT} or {JSON}")


def fields(**values: Any) -> dict[str, Any]:
    """`extra=` of a log call: fields that a JSON line has besides the message."""
    return {FIELDS: values}


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time, level, logger, message, the fields of `extra`, and the traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
