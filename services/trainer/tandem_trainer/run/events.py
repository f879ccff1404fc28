"""The file `events.jsonl`: what happened in a run besides its steps.

The parts of the program that know about a fault, such as the client of the generators, know nothing of this file. They
log it with `extra=event("generator_lost", generator=url)`, or with `Repeats.say`, and `EventHandler` writes it here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from tandem_protocol.logs import EVENT, EVENTS, FIELDS
from tandem_protocol.secrets import mask

from .metrics import JsonLinesWriter

BURST = 3
"""This number of events about the same thing is written at once."""
FIRST_PAUSE_S = 60.0
"""After a burst, events are merged into one line for this long. The pause doubles with each line."""
LONGEST_PAUSE_S = 3600.0
SUBJECTS = ("generator", "function")
"""Fields that say what an event is about. A generator that is lost and back again and again is one such thing."""

Event = dict[str, Any]


@dataclass
class _Repeats:
    """The events about one thing."""

    written: int = 0
    pause_s: float = FIRST_PAUSE_S
    next_s: float = 0.0
    """When the next line may be written."""
    last_s: float = 0.0
    """When the newest event was added."""
    waiting: Event | None = None
    """The newest event that is not written yet."""


class Events:
    """Appends events to a file, of a fault that repeats only few. Several threads may add events.

    Such a fault gets BURST lines, and then one line per pause: its newest event, with the field `repeats`. That keeps
    the file small if a replica comes and goes for days.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = JsonLinesWriter(path)
        self._clock = clock
        self._lock = Lock()
        self._repeats: dict[str, _Repeats] = {}

    def add(self, event: Event, *, may_repeat: bool = False) -> None:
        """Append an event.

        Args:
            may_repeat: merge it with others about the same thing.

        Raises:
            OSError: it cannot be written. It stays in memory.
        """
        with self._lock:
            due = self._due(event) if may_repeat else [event]
            self._file.append(due)

    def flush(self, *, is_end: bool = False) -> None:
        """Write what is in memory, and the merged events that are due: at the end all of them.

        Raises:
            OSError: they cannot be written.
        """
        now_s = self._clock()
        with self._lock:
            for repeats in self._repeats.values():
                if repeats.waiting and (is_end or now_s >= repeats.next_s):
                    self._file.kept.append(self._take(repeats, now_s))
            self._file.append(())

    def read(self) -> Iterator[Event]:
        """Yield the events of the file."""
        return self._file.read()

    def rewrite(self, events: list[Mapping[str, Any]]) -> None:
        """Replace the lines of the file.

        Raises:
            OSError: that is not possible. The file is as before.
        """
        with self._lock:
            self._file.rewrite(events)

    @property
    def kept(self) -> list[Mapping[str, Any]]:
        """Events that could not be written yet."""
        return self._file.kept

    def _due(self, event: Event) -> list[Event]:
        """Return the event if it is written now. Otherwise it waits."""
        now_s = self._clock()
        subject = next((f"{name} {event[name]}" for name in SUBJECTS if event.get(name)), event["kind"])
        repeats = self._repeats.setdefault(subject, _Repeats())
        if repeats.waiting is None and now_s >= repeats.last_s + LONGEST_PAUSE_S:  # it was quiet for long
            repeats.written, repeats.pause_s = 0, FIRST_PAUSE_S
        repeats.last_s = now_s
        count = (repeats.waiting["repeats"] if repeats.waiting else 0) + 1
        if repeats.written < BURST:
            repeats.written += 1
            repeats.next_s = now_s + repeats.pause_s
            return [event]
        repeats.waiting = event | {"repeats": count}
        return [self._take(repeats, now_s)] if now_s >= repeats.next_s else []

    def _take(self, repeats: _Repeats, now_s: float) -> Event:
        event = repeats.waiting
        assert event is not None, "the caller has looked"
        repeats.waiting = None
        repeats.pause_s = min(2 * repeats.pause_s, LONGEST_PAUSE_S)
        repeats.next_s = now_s + repeats.pause_s
        return event


def make_event(kind: str, level: str, step: int, message: str, details: Mapping[str, Any]) -> Event:
    return {
        "step": step, "time_unix_s": time.time(), "level": level, "kind": kind, "message": mask(message), **details,
    }  # fmt: skip


class EventHandler(logging.Handler):
    """Passes log records that have an event to `write`: kind, level, message and further fields."""

    def __init__(self, write: Callable[[str, str, str, Mapping[str, Any]], None]) -> None:
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        details = dict(getattr(record, FIELDS, {}))
        if kind := details.pop(EVENT, None):
            self._write(kind, record.levelname.lower(), record.getMessage(), details)


@contextmanager
def listening(handler: EventHandler) -> Iterator[None]:
    """Hand the log records of Tandem's packages to `handler` during the block.

    A TRL script may not configure logging. That a generator is back must reach the handler all the same.
    """
    rollout, trainer = logging.getLogger("tandem_rollout"), logging.getLogger("tandem_trainer")
    level = rollout.level
    if not rollout.isEnabledFor(logging.INFO):
        rollout.setLevel(logging.INFO)
    for logger in (rollout, trainer, EVENTS):
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in (rollout, trainer, EVENTS):
            logger.removeHandler(handler)
        rollout.setLevel(level)
