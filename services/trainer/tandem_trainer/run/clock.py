"""Measure how long each phase of a step, or of a publish, takes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

ItemT = TypeVar("ItemT")

PHASES = ("wait_for_rollouts", "update", "publish", "evaluate", "checkpoint")


class PhaseClock:
    """Adds up the seconds of phases. A phase inside another one counts for itself only."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Name of the phase → its seconds."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block, without that of phases inside it, to phase `name`."""
        began, before = time.monotonic(), sum(self.seconds.values())
        try:
            yield
        finally:
            inside = sum(self.seconds.values()) - before
            self.seconds[name] += time.monotonic() - began - inside

    def each(self, name: str, items: Iterable[ItemT]) -> Iterator[ItemT]:
        """Yield `items`. The time until each is there belongs to phase `name`."""
        iterator = iter(items)
        while True:
            with self.phase(name):
                item = next(iterator, None)
            if item is None:
                return
            yield item


class StepClock:
    """Timer for the phases of a step."""

    def __init__(self) -> None:
        self.start_step()

    def start_step(self) -> None:
        """Begin a step, and discard all times measured so far."""
        self._clock = PhaseClock()
        self._started = time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to phase `name`."""
        with self._clock.phase(name):
            yield

    def figures(self, tokens: int) -> dict[str, Any]:
        """Return the `timings` and `tokens_per_s` of the step so far.

        `timings` has the seconds of each phase. `other_s` is the time outside all phases, so that the sum is the time
        of the step. `tokens_per_s` is `tokens` per second, without evaluation and checkpoint, which most steps skip.
        """
        step_s = time.monotonic() - self._started
        timings = {f"{name}_s": self._clock.seconds[name] for name in PHASES}
        timings["other_s"] = max(0.0, step_s - sum(timings.values()))
        return {"timings": timings, "tokens_per_s": tokens / _training_s(timings)}


def _training_s(timings: Mapping[str, float]) -> float:
    return max(sum(timings.values()) - timings["evaluate_s"] - timings["checkpoint_s"], 1e-9)
