"""The figures of `metrics.jsonl` or `eval.jsonl` as columns of numbers, thinned for a chart."""

from __future__ import annotations

import math
import secrets
from array import array
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any

from ..tail import GrowingFile
from .json_lines import parse

POINTS = 800
"""At most this many points of a figure are sent: about one per pixel of a chart."""
MAX_FIGURES = 400
"""More figures of a step are left out. A run has about 50."""
MAX_MARKS = 2000
_MISSING = math.nan


class Series:
    """The lines of one file. A column has one number per line; 10,000 steps of a run take about 4 MB."""

    def __init__(self, path: Path) -> None:
        self.marks: deque[dict[str, Any]] = deque(maxlen=MAX_MARKS)
        """What the steps say about the course of the run: checkpoints, and where it was resumed."""
        self.marked = 0
        """Grows with every change of `marks`."""
        self._file = GrowingFile(path)
        self._generation = 0
        self._start = secrets.token_hex(4)
        """Part of each cursor, so that one of an earlier server is not taken for one of this server."""
        self._columns: dict[str, array[float]] = {}
        self._rows = 0
        self._lock = Lock()

    def read(self, after: str = "") -> dict[str, Any]:
        """Return the columns behind the cursor `after`: what an earlier call gave as `cursor`.

        Each point of a long run is a bucket of 2, 4, 8 … steps, with its mean, minimum and maximum. `start` is the
        index of the first point of the answer; the caller drops its own points from there on.
        """
        with self._lock:
            self._poll()
            bucket = 1
            while self._rows > bucket * POINTS:
                bucket *= 2
            scale = f"{self._start}.{self._file.generation}.{bucket}"
            start = int(after.rpartition(".")[2]) if after.rpartition(".")[0] == scale else 0
            edges = [*range(start * bucket, self._rows, bucket), self._rows]
            return {
                "cursor": f"{scale}.{self._rows // bucket}",
                "start": start,
                "bucket": bucket,
                "rows": self._rows,
                "columns": {name: self._points(column, edges, bucket) for name, column in self._columns.items()},
            }

    def last(self, name: str) -> float | None:
        """Return a figure of the newest step that has it."""
        with self._lock:
            self._poll()
            return _finite(next((value for value in reversed(self._columns.get(name, ())) if value == value), _MISSING))

    def _points(self, column: array[float], edges: list[int], bucket: int) -> dict[str, list[float | None]]:
        if bucket == 1:
            return {"mean": [_finite(value) for value in self._padded(column, edges[0], edges[-1])]}
        groups = [[v for v in self._padded(column, *edge) if v == v] for edge in pairwise(edges)]
        return {
            "mean": [_finite(sum(group) / len(group)) if group else None for group in groups],
            "low": [_finite(min(group)) if group else None for group in groups],
            "high": [_finite(max(group)) if group else None for group in groups],
        }

    def _padded(self, column: array[float], start: int, end: int) -> list[float]:
        """Return numbers of a column. A figure that the last steps do not have has fewer numbers than there are."""
        values = column[start:end].tolist()
        return values + [_MISSING] * (end - start - len(values))

    def _poll(self) -> None:
        for line in self._file.poll():
            self._follow()
            if (record := parse(line, checks_range=False)) is not None:
                self._add(record)
        self._follow()

    def _follow(self) -> None:
        """Forget everything if the file is read again from its beginning."""
        if self._generation != self._file.generation:
            self._generation = self._file.generation
            self._columns.clear()
            self.marks.clear()
            self.marked += 1
            self._rows = 0

    def _add(self, record: Mapping[str, Any]) -> None:
        for name, value in figures(record):
            column = self._columns.get(name)
            if column is None:
                if len(self._columns) >= MAX_FIGURES:
                    continue
                column = self._columns[name] = array("d")
            if len(column) > self._rows:
                continue  # `a.b` and the key `b` of the field `a` have the same name
            if len(column) < self._rows:
                column.extend([_MISSING] * (self._rows - len(column)))
            column.append(value)
        self._mark(record)
        self._rows += 1

    def _mark(self, record: Mapping[str, Any]) -> None:
        """Note what this line says, which `_add` has added to the columns."""
        attempts, seconds = (self._columns.get(name) for name in ("attempt", "timings.checkpoint_s"))
        if attempts and self._rows and len(attempts) > self._rows and attempts[-1] > attempts[-2]:
            self._note(record.get("step"), "resumed", f"The run was resumed, attempt {attempts[-1]:.0f}.")
        if seconds and len(seconds) > self._rows and seconds[-1] > 0:
            self._note(record.get("step"), "checkpoint", f"A checkpoint was written in {seconds[-1]:.1f} s.")

    def _note(self, step: Any, kind: str, message: str) -> None:
        self.marked += 1
        self.marks.append({"step": step, "kind": kind, "message": message})


def figures(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record. A key within a field follows behind a dot: `timings.update_s`.

    The attempt of `version` is the figure `attempt`. A null is left out.
    """
    for name, value in record.items():
        kind = type(value)  # JSON has no other types, and this is faster than isinstance in a run of 10,000 steps
        if kind is float:
            if value - value == 0:  # not 1e999, which is infinite
                yield f"{prefix}{name}", value
        elif kind is dict:
            yield from figures(value, f"{prefix}{name}.")
        elif kind is int:
            yield f"{prefix}{name}", _float(value)
        elif name == "version" and not prefix:
            _, _, attempt = str(value).partition(".")
            yield "attempt", float(attempt) if attempt.isdecimal() else _MISSING


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of 400 digits
        return _MISSING


def _finite(value: float) -> float | None:
    """Return a number as JSON: rounded, because a chart shows no more digits, and None if it is not finite."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
