"""What a run is doing and how it fares, from the files that the trainer writes and the generator's own answers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from tandem_protocol.messages import Readiness
from tandem_protocol.routes import METRICS, READYZ

from .tail import JsonLinesReader

PROBE_EVERY_S = 1.0
_PROBE_TIMEOUT_S = 1.0
_RECENT_STEPS = 20


class Record(BaseModel):
    """Base of what the trainer writes for its readers; keys that are not shown are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class StepMetrics(Record):
    """A line of metrics.jsonl."""

    step: int
    version: str
    reward_mean: float | None
    """None when no reward function had an opinion."""
    kl_sampler: float
    lag_max: int
    completion_tokens_mean: float
    rollout_tokens: int
    timings: dict[str, float]
    """Seconds, one entry a phase; together the whole step."""

    @property
    def duration_s(self) -> float:
        return sum(self.timings.values())


class EvalResult(Record):
    """A line of eval.jsonl."""

    step: int
    reward_mean: float | None
    pass_at: dict[str, dict[str, float]] = {}
    """By reward function and k."""


class Sample(Record):
    """A line of rollouts.jsonl."""

    prompt: str
    completion: str
    reward: float | None


class Status(Record):
    """status.json."""

    phase: str
    since_unix_s: float


@dataclass(frozen=True)
class GeneratorState:
    """What the generator answers about itself."""

    ready: bool
    reason: str
    running: int = 0
    waiting: int = 0


class GeneratorProbe:
    """Asks a generator for its state."""

    def __init__(self, url: str, token: str) -> None:
        self._client = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=_PROBE_TIMEOUT_S, trust_env=False
        )

    def __call__(self) -> GeneratorState:
        try:
            readiness = Readiness.model_validate_json(self._client.get(READYZ).content)
            metrics = self._client.get(METRICS).text if readiness.ready else ""
        except httpx.TimeoutException:
            return GeneratorState(False, f"no answer within {_PROBE_TIMEOUT_S:g} s")
        except (httpx.TransportError, ValidationError):
            return GeneratorState(False, "starting")
        return GeneratorState(
            readiness.ready,
            readiness.reason,
            running=gauge(metrics, "vllm:num_requests_running", "tandem_requests_running"),
            waiting=gauge(metrics, "vllm:num_requests_waiting"),
        )


class Progress:
    """All that is known of a run; `poll` brings it up to date."""

    def __init__(self, run_dir: Path, max_steps: int, probe: Callable[[], GeneratorState]) -> None:
        self.max_steps = max_steps
        self.steps = JsonLinesReader(run_dir / "metrics.jsonl", StepMetrics)
        self.evals = JsonLinesReader(run_dir / "eval.jsonl", EvalResult)
        self.samples = JsonLinesReader(run_dir / "rollouts.jsonl", Sample)
        self.status: Status | None = None
        self.generator = GeneratorState(False, "starting")
        self.was_ready = False
        """Whether the generator has ever been ready."""
        self._status_file = run_dir / "status.json"
        self._probe = probe
        self._probed = 0.0

    def poll(self) -> None:
        for lines in (self.steps, self.evals, self.samples):
            lines.poll()
        if self._status_file.exists():
            self.status = Status.model_validate_json(self._status_file.read_bytes())
        if time.monotonic() - self._probed > PROBE_EVERY_S:
            self.generator, self._probed = self._probe(), time.monotonic()
            self.was_ready |= self.generator.ready

    @property
    def step(self) -> int:
        return self.steps.records[-1].step if self.steps.records else 0

    @property
    def rewards(self) -> list[float]:
        return [metrics.reward_mean for metrics in self.steps.records if metrics.reward_mean is not None]

    @property
    def eval_rewards(self) -> list[float]:
        return [result.reward_mean for result in self.evals.records if result.reward_mean is not None]

    @property
    def remaining_s(self) -> float | None:
        """Estimated from the last steps; None before the first."""
        recent = self.steps.records[-_RECENT_STEPS:]
        return (self.max_steps - self.step) * sum(s.duration_s for s in recent) / len(recent) if recent else None

    @property
    def recent_tokens_per_s(self) -> float | None:
        return tokens_per_s(self.steps.records[-_RECENT_STEPS:])


def tokens_per_s(steps: Sequence[StepMetrics]) -> float | None:
    """Sampled tokens that were trained on, by the time these steps took in all; None without any."""
    duration_s = sum(step.duration_s for step in steps)
    return sum(step.rollout_tokens for step in steps) / duration_s if duration_s else None


def gauge(metrics: str, *names: str) -> int:
    """The first of the gauges `names` that a Prometheus page has, summed over its labels; 0 without any."""
    for name in names:
        if values := re.findall(rf"^{name}(?:{{.*}})? (\S+)", metrics, re.MULTILINE):
            return int(sum(map(float, values)))
    return 0
