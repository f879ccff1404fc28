"""What happened in a run besides its steps: `events.jsonl`, evaluations, checkpoints and resumes."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from ..tail import GrowingFile
from .json_lines import parse
from .series import Series

MAX_EVENTS = 2000
"""Of more events the newest are kept."""
Event = dict[str, Any]


def _evaluated(record: Mapping[str, Any]) -> Event:
    reward = record.get("reward_mean")
    shown = f"{reward:.4g}" if isinstance(reward, int | float) else "none"
    prompts = f" on {record['n']} prompts" if "n" in record else ""
    return {"step": record.get("step"), "kind": "evaluation", "message": f"Reward {shown}{prompts}."}


class _File:
    """The newest events of one file."""

    def __init__(self, path: Path, read: Callable[[Mapping[str, Any]], Event] = dict) -> None:
        self.changes = 0
        self.newest: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._file = GrowingFile(path)
        self._generation = 0
        self._read = read

    def poll(self) -> None:
        for line in self._file.poll():
            self._follow()
            if (record := parse(line)) is not None:
                self.newest.append(self._read(record))
                self.changes += 1
        self._follow()

    def _follow(self) -> None:
        """Forget everything if the file is read again from its beginning."""
        if self._generation != self._file.generation:
            self._generation = self._file.generation
            self.newest.clear()
            self.changes += 1


class Timeline:
    def __init__(self, folder: Path, steps: Series) -> None:
        self._files = (_File(folder / "events.jsonl"), _File(folder / "eval.jsonl", _evaluated))
        self._steps = steps
        self._start = secrets.token_hex(4)
        """Part of each cursor, so that one of an earlier server is not taken for one of this server."""
        self._lock = Lock()

    def read(self, after: str = "") -> dict[str, Any]:
        """Return all events in the order of their steps, or None if there are no others than at the cursor `after`."""
        with self._lock:
            for file in self._files:
                file.poll()
            changes = (*(file.changes for file in self._files), self._steps.marked)
            cursor = ".".join(map(str, (self._start, *changes)))
            if cursor == after:
                return {"cursor": cursor, "events": None}
            written, evaluated = (list(file.newest) for file in self._files)
            kinds = {event.get("kind") for event in written}
            # Runs of earlier releases have no events about evaluations, checkpoints and resumes.
            events = written + [e for e in (*evaluated, *self._steps.marks) if e["kind"] not in kinds]
        return {"cursor": cursor, "events": sorted(events, key=_order)}


def _order(event: Event) -> tuple[float, float]:
    step, time_s = event.get("step"), event.get("time_unix_s")
    return (
        float(step) if isinstance(step, int | float) else -1.0,
        float(time_s) if isinstance(time_s, int | float) else 0.0,
    )
