"""Raise alerts about the figures of a run's steps: each once, until it has ended.

What is going on is a field of each record, `alerts`: name → the step at which it was raised. A run that resumes reads
it from the record of its checkpoint, so it neither forgets an alert nor raises it again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from tandem_protocol.config.alerts import AlertsConfig

from .detectors import DETECTORS, Detector
from .measures import WINDOW, Facts, Record, train_reward

EVALUATIONS = 32
"""Number of evaluations that are kept."""
COUNTED_STEPS = 16
"""At least as many steps as an alert needs in a row to be raised or to end."""
REWARD_STEPS = 10
"""The training reward at the time of an evaluation is a mean over this many steps."""
PAGE = "alerts.html"
"""The page of the documentation, in docs/train."""


class Change(NamedTuple):
    """An alert that was raised, or has ended."""

    name: str
    level: str
    message: str
    details: dict[str, Any]
    """Further fields of its event."""


def page_of(name: str) -> str:
    """The page and the section that explain an alert."""
    return f"{PAGE}#{name.replace('_', '-')}"


class Alerts:
    """The alerts of one run. The main process has it."""

    def __init__(self, config: AlertsConfig | None, facts: Facts) -> None:
        """
        Args:
            config: the limits. None: there are no alerts.
            facts: what the measures know besides the records.
        """
        limits = config.model_dump() if config else {}
        self._limits: dict[str, float] = {name: limit for name, limit in limits.items() if limit is not None}
        self.facts = facts
        self._records: list[Record] = []
        """The newest WINDOW records."""
        self._evaluations: deque[Record] = deque(maxlen=EVALUATIONS)
        self._beyond: Counter[str] = Counter()
        self._within: Counter[str] = Counter()
        """For how many measured steps in a row a figure has been beyond, or well within, its limit."""
        self.active: dict[str, int] = {}
        """Name → the step at which the alert was raised."""

    def resume(self, records: Iterable[Record]) -> None:
        """Continue after `records`, those of all steps so far. They raise no alerts again."""
        newest: deque[Record] = deque(maxlen=WINDOW + COUNTED_STEPS)
        for record in records:
            self._add(record)
            newest.append(record)
        self._records = []
        for record in newest:
            self._records = [*self._records[1 - WINDOW :], record]
            for name in self._limits:
                self._count(name)
        raised = (newest[-1].get("alerts") if newest else None) or {}
        self.active = {name: step for name, step in raised.items() if name in self._limits}

    def check(self, record: Record) -> Iterator[Change]:
        """Add the record of a step or of a skipped batch, and yield what was raised or has ended with it."""
        self._add(record)
        step = int(record["step"])
        for name, limit in self._limits.items():
            detector, value = DETECTORS[name], self._count(name)
            if value is None:
                continue
            if name not in self.active and self._beyond[name] >= detector.raises_after:
                self.active[name] = step
                yield self._raised(name, value, limit)
            elif name in self.active and self._within[name] >= detector.ends_after:
                yield self._ended(name, value)

    def _add(self, record: Record) -> None:
        self._records = [*self._records[1 - WINDOW :], record]
        if record.get("eval"):
            self._evaluations.append({**record, "train_reward": train_reward(self._records[-REWARD_STEPS:])})

    def _count(self, name: str) -> float | None:
        """Measure the newest record, and count it. Returns the figure."""
        detector, limit = DETECTORS[name], self._limits[name]
        value = self._measure(detector)
        if value is not None:
            self._beyond[name] = self._beyond[name] + 1 if detector.is_beyond(value, limit) else 0
            self._within[name] = self._within[name] + 1 if detector.is_within(value, limit) else 0
        return value

    def _measure(self, detector: Detector) -> float | None:
        if not detector.of_evaluations:
            return detector.measure(self._records, self.facts)
        if not self._records[-1].get("eval") or not self._evaluations:
            return None
        return detector.measure(list(self._evaluations), self.facts)

    def _raised(self, name: str, value: float, limit: float) -> Change:
        detector = DETECTORS[name]
        details = {"state": "raised", "value": value, "limit": limit, "page": page_of(name)}
        message = detector.message(value, limit, self._records, self.facts)
        more = f"More: docs/train/{page_of(name).replace('.html', '.md')}"
        return Change(name, detector.level, f"{message} {more}", details)

    def _ended(self, name: str, value: float) -> Change:
        since = self.active.pop(name)
        message = f"The alert {name} of step {since} has ended: its figure is {value:.3g} now."
        details = {"state": "ended", "value": value, "limit": self._limits[name], "since": since, "page": page_of(name)}
        return Change(name, "info", message, details)


def without_later_alerts(events: Iterable[Mapping[str, Any]], step: int) -> list[Mapping[str, Any]]:
    """Leave out alerts of steps after `step`, which a resumed run computes again. Faults have happened, and stay."""
    return [event for event in events if "state" not in event or event["step"] <= step]
