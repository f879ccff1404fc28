"""One readable line per step, for the log."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from tandem_protocol.durations import duration

RECENT_STEPS = 20
"""The remaining time is estimated from this many steps."""


class StepLine:
    """Makes the lines of a run; it remembers how long the last steps took."""

    def __init__(self, max_steps: int) -> None:
        self._max_steps = max_steps
        self._durations_s: deque[float] = deque(maxlen=RECENT_STEPS)

    def __call__(self, record: Mapping[str, Any]) -> str:
        """The line for one record of `metrics.jsonl`.

        Example: `step 42/200  reward 0.512  eval 0.610  1,930 tokens/s  lag 1  3.2 s  8 min 26 s left`
        """
        step, seconds = record["step"], sum(record["timings"].values())
        self._durations_s.append(seconds)
        parts = [f"step {step}/{self._max_steps}", f"reward {_number(record['reward_mean'])}"]
        if "eval" in record:
            parts.append(f"eval {_number(record['eval']['reward_mean'])}")
        if seconds:
            parts.append(f"{record['rollout_tokens'] / seconds:,.0f} tokens/s")
        parts += [f"lag {record['lag_max']}", f"{seconds:.1f} s"]
        if left := self._max_steps - step:
            parts.append(f"{duration(left * sum(self._durations_s) / len(self._durations_s))} left")
        return "  ".join(parts)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
