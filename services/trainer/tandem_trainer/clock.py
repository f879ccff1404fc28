"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

PHASES = ("wait_for_rollouts", "update", "publish", "evaluate", "checkpoint")


class StepClock:
    """Times the phases of one step after the other."""

    def __init__(self) -> None:
        self.start_step()

    def start_step(self) -> None:
        """Begin a step; what was timed before belongs to none."""
        self._timings: defaultdict[str, float] = defaultdict(float)
        self._started = time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's time as that of a phase."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._timings[name] += time.monotonic() - started

    def figures(self, tokens: int) -> dict[str, Any]:
        """Seconds of each phase so far, and `tokens` per second of the step.

        `other_s` is the time outside of all phases, so that `timings` add up to the whole step. The speed leaves out
        the evaluation and the checkpoint, which most steps do not have.
        """
        step_s = time.monotonic() - self._started
        timings = {f"{name}_s": self._timings[name] for name in PHASES}
        timings["other_s"] = max(0.0, step_s - sum(timings.values()))
        return {"timings": timings, "tokens_per_s": tokens / _training_s(timings)}


def _training_s(timings: Mapping[str, float]) -> float:
    return max(sum(timings.values()) - timings["evaluate_s"] - timings["checkpoint_s"], 1e-9)
