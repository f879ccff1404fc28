"""Trajectories of `rollouts.jsonl`: those of a step, one of them, and a search."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel

from .json_lines import (
    Ends,
    Line,
    after_newline_before,
    ends,
    first_of_step,
    first_undamaged,
    is_start,
    lines,
    step_of,
)

MAX_ROWS = 500
"""Trajectories of a step in one answer."""
MAX_MATCHES = 50
"""Results of a search in one answer."""
READ_BYTES = 64 << 20
"""One answer reads about this much at most."""
READ_S = 0.5
_SHOWN = 240
"""Characters of a prompt and a completion in a list."""
_END_SHOWN = 80
"""Characters of the end of a longer completion. Completions to one prompt often begin alike."""
_NUMBERS = ("step", "row", "reward", "advantage", "turns", "tool_calls", "tool_errors", "tokens")


class Moved(Exception):
    """No line starts at an offset: a resumed run has cut the file since it was given."""


class Query(BaseModel):
    """What a search looks for. A condition that is not set holds for every trajectory."""

    text: str = ""
    """In the conversation or the reason of a failure; upper and lower case are the same."""
    status: str = ""
    min_reward: float | None = None
    max_reward: float | None = None
    tool_errors: bool = False
    """Only trajectories with a tool call that was answered with an error."""
    from_step: int = 0
    to_step: int | None = None
    after: int | None = None
    """`next` of an earlier answer, to continue behind it."""

    def may_match(self, data: bytes) -> bool:
        """Whether a line can match, without parsing it. Only plain ASCII stands in JSON as it is written."""
        plain = self.text.isascii() and self.text.isprintable() and not set(self.text) & set('"\\/')
        return not plain or self.text.lower().encode() in data.lower()

    def matches(self, record: Mapping[str, Any]) -> bool:
        reward = record.get("reward")
        number = reward if isinstance(reward, int | float) else None
        return (
            (not self.status or record.get("status") == self.status)
            and (self.min_reward is None or (number is not None and number >= self.min_reward))
            and (self.max_reward is None or (number is not None and number <= self.max_reward))
            and (not self.tool_errors or bool(record.get("tool_errors")))
            and self.text.lower() in _text(record).lower()
        )


def _text(record: Mapping[str, Any]) -> str:
    """Return everything that a person reads in a trajectory."""
    return "\n".join(_strings([record.get(name) for name in ("prompt", "completion", "reason", "messages")]))


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings in a JSON value, in order. The keys of objects are left out."""
    left = [value]
    while left:
        match left.pop():
            case str(text):
                yield text
            case list(items):
                left.extend(reversed(items))
            case dict(fields):
                left.extend(reversed(fields.values()))


class Rollouts:
    """Opens the file for each answer and keeps almost nothing in memory. A missing file has no trajectories."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._first = 0
        """Offset of the first undamaged line, when it was last looked for."""
        self._last: tuple[int, int | None] = 0, None
        """Where the file ended when it was looked at, and its last step."""
        self._ends = Ends()

    def span(self) -> dict[str, Any]:
        """Return the first and the last step, and the size of the file.

        The page asks for it all the time. So damaged lines at either end, which may be long, are not read again.
        """
        with self._open() as (file, end):
            if not (self._first < end and is_start(file, self._first, end) and step_of(file, self._first) is not None):
                self._first = first_undamaged(file, end)
            known_end, last = self._last
            if end != known_end:
                last = _step_before(file, end)
                self._last = end, last
            first = step_of(file, self._first) if self._first < end else None
            return {"first": first, "last": last, "size_bytes": end}

    def of_step(self, step: int, after: int | None = None) -> dict[str, Any]:
        """Return summaries of a step's trajectories, and the steps before and after it that have some.

        Args:
            step: a step.
            after: `next` of an earlier answer, to continue behind it.

        Raises:
            Moved: `after` is not valid any more.
        """
        page: dict[str, Any] = {"step": step, "rows": [], "next": None}
        with self._open() as (file, end):
            first, behind = (first_of_step(file, number, end) for number in (step, step + 1))
            start = first if after is None else _checked(file, after, end)
            page["earlier"] = _step_before(file, first)
            page["later"] = step_of(file, behind) if behind < end else None
            for line in lines(file, start, behind):
                if len(page["rows"]) >= MAX_ROWS or line.start - start > READ_BYTES:
                    page["next"] = line.start
                    break
                page["rows"].append(summary(line))
        return page

    def one(self, offset: int) -> dict[str, Any]:
        """Return the complete record of a trajectory.

        Raises:
            Moved: no trajectory starts at `offset`.
        """
        with self._open() as (file, end):
            line = next(lines(file, _checked(file, offset, end), end), None)
        if line is None or line.record is None:
            raise Moved
        return line.record

    def search(self, query: Query) -> dict[str, Any]:
        """Return the next matches. `next` continues the search; it is None at the end of the file.

        Raises:
            Moved: `query.after` is not valid any more.
        """
        deadline_s = time.monotonic() + READ_S
        with self._open() as (file, end):
            start = (
                first_of_step(file, query.from_step, end) if query.after is None else _checked(file, query.after, end)
            )
            found: list[dict[str, Any]] = []
            for line in lines(file, start, end):
                is_late = line.start > start and time.monotonic() > deadline_s  # each answer reads a line
                if len(found) >= MAX_MATCHES or line.start - start > READ_BYTES or is_late:
                    return {"rows": found, "next": line.start, "read": line.start / end}
                if query.to_step is not None and (step_of(file, line.start) or 0) > query.to_step:
                    break
                if line.data and query.may_match(line.data) and (record := line.record) and query.matches(record):
                    found.append(summary(line))
            return {"rows": found, "next": None, "read": 1.0}

    @contextmanager
    def _open(self) -> Iterator[tuple[BinaryIO, int]]:
        """Open the file. Yields it and the end of its last complete line."""
        try:
            file: BinaryIO = self._path.open("rb")
        except FileNotFoundError:
            file = io.BytesIO()
        with file:
            self._ends = found = ends(file, self._ends)
            yield file, found.complete


def _checked(file: BinaryIO, offset: int, end: int) -> int:
    if not is_start(file, offset, end):
        raise Moved
    return offset


def _step_before(file: BinaryIO, start: int) -> int | None:
    """Return the step of the last undamaged line in front of `start`."""
    while start > 0:
        start = after_newline_before(file, start - 1)
        if (step := step_of(file, start)) is not None:
            return step
    return None


def summary(line: Line) -> dict[str, Any]:
    """Return what a list shows of a trajectory. `at` is the offset by which `one` finds it."""
    record = line.record
    if record is None:
        return {"at": line.start, "damaged": f"A line of {line.end - line.start:,} bytes cannot be read."}
    rewards = record.get("rewards")
    return {
        "at": line.start,
        **{name: value for name in _NUMBERS if _is_number(value := record.get(name))},
        "rewards": {str(k): v for k, v in rewards.items() if _is_number(v)} if isinstance(rewards, dict) else {},
        "skipped": record.get("skipped") is True,
        "status": _start(record.get("status")),
        "prompt": _start(record.get("prompt")),
        "completion": _start(record.get("completion")),
        "completion_end": _end(record.get("completion")),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _start(value: Any) -> str:
    return value[:_SHOWN] if isinstance(value, str) else ""


def _end(value: Any) -> str:
    return value[-_END_SHOWN:] if isinstance(value, str) and len(value) > _SHOWN else ""
