"""Log what repeats: at once, then after 30 s, and ever more rarely, up to every 10 minutes.

Without it, a run of ten hours whose generator is away for a night would fill its log with that.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .logs import EVENTS, fields
from .logs import event as make_event

FIRST_PAUSE_S, LONGEST_PAUSE_S = 30.0, 600.0


_MOST_KINDS = 1000


def pause_after(pause_s: float) -> float:
    """Return the pause that follows a pause."""
    return min(2 * pause_s, LONGEST_PAUSE_S)


@dataclass
class _Kind:
    last_s: float
    due_s: float
    pause_s: float = FIRST_PAUSE_S
    unsaid: int = 0


class Repeats:
    """Logs the messages of one place in the code, by kind. A kind that was quiet for long begins again."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._kinds: dict[str, _Kind] = {}

    def say(
        self, level: int, kind: str, message: str, *, traceback: bool = False, event: str = "", **values: Any
    ) -> None:
        """Log a message now, or count it, so that a later one of its kind says how many were left out.

        Args:
            kind: what the message is about, the same in each repetition.
            event: the kind of the event that the message is, if it belongs into the run's `events.jsonl`. There, each
                counts, also those that the log leaves out.
            traceback: add the traceback of the exception that is handled now.
            values: further fields of a JSON line.
        """
        if event:
            EVENTS.log(level, "%s", message, extra=make_event(event, **values))
        if (unsaid := self._unsaid(kind)) is None:
            return
        more = f" ({unsaid} more like this since the last such line)" if unsaid else ""
        if unsaid:
            values["repeated"] = unsaid
        self._log.log(level, "%s%s", message, more, exc_info=traceback, extra=fields(**values))

    def _unsaid(self, kind: str) -> int | None:
        """Return how many messages were left out since the last line; None if this one is left out, too."""
        now_s = self._clock()
        known = self._kinds.get(kind)
        if len(self._kinds) > _MOST_KINDS:
            self._kinds.clear()
        if known is None or (now_s - known.last_s > LONGEST_PAUSE_S and not known.unsaid):
            self._kinds[kind] = _Kind(now_s, now_s + FIRST_PAUSE_S)
            return 0
        known.last_s = now_s
        if now_s < known.due_s:
            known.unsaid += 1
            return None
        unsaid, known.unsaid = known.unsaid, 0
        known.pause_s = pause_after(known.pause_s)
        known.due_s = now_s + known.pause_s
        return unsaid
