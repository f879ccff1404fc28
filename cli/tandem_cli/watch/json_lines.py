"""Find lines of a large JSON Lines file whose steps never decrease, without reading the file and without an index.

Each function takes a file that is open for reading bytes. Memory is bounded by `LINE_BYTES`, however large the file is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple

from ..tail import BLOCK_BYTES, LINE_BYTES, behind_newline

_STEP = re.compile(rb'\{"step": ?(\d{1,18})[,}]')
"""The beginning of a line, as the trainer writes it."""


class Line(NamedTuple):
    start: int
    end: int
    """Offset behind its newline."""
    data: bytes | None
    """None if it is longer than LINE_BYTES."""

    @property
    def record(self) -> dict[str, Any] | None:
        return None if self.data is None else parse(self.data)


def parse(data: bytes, *, checks_range: bool = True) -> dict[str, Any] | None:
    """Return the object of a line; None if it is not an object: a killed process has not completed it.

    NaN and infinity, which JSON cannot express, become None.

    Args:
        checks_range: 1e999 becomes None too. Otherwise it is infinite, and parsing is faster.
    """
    with suppress(ValueError, RecursionError):
        record = json.loads(data, parse_constant=lambda _: None, parse_float=_finite if checks_range else None)
        if isinstance(record, dict):
            return record
    return None


def _finite(text: str) -> float | None:
    return value if math.isfinite(value := float(text)) else None


class Ends(NamedTuple):
    """Where a file ended when it was looked at."""

    complete: int = 0
    """The offset behind the last newline. What follows is a line that is being written."""
    size: int = 0


def ends(file: BinaryIO, before: Ends) -> Ends:
    """Look for the last newline. What follows a line that is too long is not read twice.

    Args:
        before: what the last look found.
    """
    size = file.seek(0, 2)
    is_long = before.size - before.complete > LINE_BYTES and before.size <= size
    if is_long and is_start(file, before.complete, size):
        return Ends(after_newline_before(file, size, before.size) or before.complete, size)
    return Ends(after_newline_before(file, size), size)


def after_newline_before(file: BinaryIO, end: int, begin: int = 0) -> int:
    """Return the offset behind the last newline between `begin` and `end`; 0 if there is none."""
    while end > begin:
        start = max(begin, end - BLOCK_BYTES)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def is_start(file: BinaryIO, offset: int, end: int) -> bool:
    """Whether a line starts at `offset`. After a resumed run has cut the file, an earlier offset may be within one."""
    if not 0 < offset <= end:
        return offset == 0
    file.seek(offset - 1)
    return file.read(1) == b"\n"


def lines(file: BinaryIO, start: int, end: int) -> Iterator[Line]:
    """Yield the lines between two offsets."""
    while start < end:
        file.seek(start)
        data = file.readline(LINE_BYTES)
        if not data:
            return
        behind = start + len(data)
        if data.endswith(b"\n"):
            yield Line(start, behind, data)
        else:
            behind = behind_newline(file, behind, end)
            yield Line(start, behind, None)
        start = behind


def line_before(file: BinaryIO, start: int) -> Line | None:
    """Return the line in front of the one that starts at `start`; None if that is the first."""
    return next(lines(file, after_newline_before(file, start - 1), start), None) if start > 0 else None


def step_of(file: BinaryIO, start: int) -> int | None:
    """Return the step of the line at `start`; None if the line is damaged. Usually reads only its beginning."""
    file.seek(start)
    if found := _STEP.match(file.read(64)):
        return int(found[1])
    file.seek(start)
    step = (parse(file.readline(LINE_BYTES)) or {}).get("step")
    return step if isinstance(step, int) else None


def first_of_step(file: BinaryIO, step: int, end: int) -> int:
    """Return the offset of the first line of `step` or of a later one; `end` if there is none. It bisects the file.

    Damaged lines are skipped.
    """
    low, high, found = 0, end, end  # lines in front of `low` are of earlier steps; `found` is of `step` or later
    while low < high:
        middle = (low + high) // 2
        start = 0 if middle == 0 else behind_newline(file, middle - 1, end)
        at = None
        while start < found and (at := step_of(file, start)) is None:
            start = behind_newline(file, start, end)
        if at is not None and at < step:
            low = start + 1
            continue
        found = found if at is None else start
        high = after_newline_before(file, middle - 1) + 1 if middle else 0  # no other line starts up to `middle`
    return found


def first_undamaged(file: BinaryIO, end: int) -> int:
    """Return the offset of the first line that has a step; `end` if there is none."""
    start = 0
    while start < end and step_of(file, start) is None:
        start = behind_newline(file, start, end)
    return start
