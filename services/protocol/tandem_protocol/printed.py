"""What other code prints becomes log records, so that a log in JSON has nothing else."""

from __future__ import annotations

import atexit
import io
import json
import logging
import os
import sys
import threading
from collections.abc import Mapping
from typing import TextIO

from .logs import JSON, LOG_ENV


def capture_output(env: Mapping[str, str] = os.environ) -> None:
    """With JSON, log each line that is printed from now on, such as by `print` in a reward function.

    Call it when logging is configured, before code of the project runs. It does not see what C code writes, or another
    process.
    """
    if env.get(LOG_ENV) == JSON and not isinstance(sys.stdout, PrintedLines):
        sys.stdout = PrintedLines("stdout", sys.stdout)
        sys.stderr = PrintedLines("stderr", sys.stderr)


def show(log: logging.Logger, line: str, env: Mapping[str, str] = os.environ) -> None:
    """Print a line of another program; with JSON, log it, unless it is a log record itself."""
    if env.get(LOG_ENV) != JSON or _is_record(line):
        print(line.rstrip(), flush=True)
    elif shown := _visible(line):
        log.info("%s", shown)


def _is_record(line: str) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and record.keys() >= {"time", "level", "message"}


def _visible(line: str) -> str:
    """Return what a terminal shows of a line: not what a carriage return overwrites."""
    return line.rstrip().rpartition("\r")[2].rstrip()


class _Thread(threading.local):
    line = ""
    is_logging = False


class PrintedLines(io.TextIOBase):
    """A text stream that logs each line. What a carriage return overwrites, as in a progress bar, is dropped."""

    def __init__(self, name: str, replaced: TextIO) -> None:
        self._log = logging.getLogger(f"{__name__}.{name}")
        self._replaced = replaced
        self._thread = _Thread()
        atexit.register(self.end)

    @property
    def encoding(self) -> str:  # type: ignore[override]  # it is an attribute there
        return self._replaced.encoding

    def write(self, text: str) -> int:
        if self._thread.is_logging:  # a handler of the project writes here, too
            return self._replaced.write(text)
        *lines, self._thread.line = f"{self._thread.line}{text}".split("\n")
        self._thread.is_logging = True
        try:
            for line in lines:
                if shown := _visible(line):
                    self._log.info("%s", shown)
        finally:
            self._thread.is_logging = False
        return len(text)

    def end(self) -> None:
        """Log a last line without a newline."""
        if self._thread.line:
            self.write("\n")

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._replaced.fileno()
