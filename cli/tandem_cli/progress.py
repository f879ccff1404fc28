"""The state of a run, read from the files that the trainer writes and from the generator's HTTP endpoints."""

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
_RECENT_EVENTS = 3


class Record(BaseModel):
    """Base of the records that the trainer writes. Keys that the screen does not show are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class StepRow(Record):
    """A line of metrics.jsonl."""

    step: int
    version: str
    reward_mean: float | None
    """None if no reward function gave a value."""
    max_steps: int | None = None
    """A TRL script says it here."""
    kl_sampler: float | None = None
    lag_max: int | None = None
    """None for a TRL script, as `kl_sampler`."""
    alerts: dict[str, int] = {}
    """The alerts that go on: name → the step at which each was raised."""
    completion_tokens_mean: float
    rollout_tokens: int
    timings: dict[str, float]
    """Seconds per phase. Their sum is the duration of the step."""

    @property
    def duration_s(self) -> float:
        return sum(self.timings.values())


class EvalResult(Record):
    """A line of eval.jsonl."""

    step: int
    reward_mean: float | None
    pass_at: dict[str, dict[str, float]] = {}
    """Reward function → k → pass@k."""


class CompletionRow(Record):
    """A line of rollouts.jsonl."""

    prompt: str
    completion: str
    reward: float | None


class EventRow(Record):
    """A line of events.jsonl."""

    step: int
    kind: str
    level: str = "info"
    message: str
    state: str | None = None
    """`raised` or `ended` for an alert. None: it is not an alert."""


class Status(Record):
    """The content of status.json."""

    phase: str
    version: str
    """The version that was published last."""
    since_unix_s: float


@dataclass(frozen=True)
class GeneratorState:
    """The state that the generator reports."""

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
    """The records and state of a run. `poll` updates them."""

    def __init__(self, run_dir: Path, max_steps: int | None, probe: Callable[[], GeneratorState]) -> None:
        self._max_steps = max_steps
        self.steps = JsonLinesReader(run_dir / "metrics.jsonl", StepRow)
        self.evals = JsonLinesReader(run_dir / "eval.jsonl", EvalResult)
        self.samples = JsonLinesReader(run_dir / "rollouts.jsonl", CompletionRow)
        self.events = JsonLinesReader(run_dir / "events.jsonl", EventRow)
        self.status: Status | None = None
        self.generator = GeneratorState(False, "starting")
        self.was_ready = False
        """True once the generator has been ready."""
        self._status_file = run_dir / "status.json"
        self._probe = probe
        self._probed = 0.0

    def poll(self) -> None:
        """Read new records, and ask the generator once per `PROBE_EVERY_S`."""
        for reader in (self.steps, self.evals, self.samples, self.events):
            reader.poll()
        if self._status_file.exists():
            self.status = Status.model_validate_json(self._status_file.read_bytes())
        if time.monotonic() - self._probed > PROBE_EVERY_S:
            self.generator = self._probe()
            self._probed = time.monotonic()
            self.was_ready |= self.generator.ready

    @property
    def max_steps(self) -> int | None:
        """None if it is not known yet."""
        return self._max_steps or (self.steps.records[-1].max_steps if self.steps.records else None)

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
    def problems(self) -> list[EventRow]:
        """The alerts that go on, and faults since the last complete step."""
        active = self.steps.records[-1].alerts if self.steps.records else {}
        raised = {event.kind: event for event in self.events.records if event.kind in active}
        faults = [event for event in self.events.records[-_RECENT_EVENTS:] if event.state is None]
        return [*raised.values(), *(one for one in faults if one.level != "info" and one.step >= self.step)]

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the last step, estimated from recent steps. None before the first step."""
        recent = self.steps.records[-_RECENT_STEPS:]
        if not recent or self.max_steps is None:
            return None
        earlier = self.steps.records[: -len(recent)]
        steps = self.step - (earlier[-1].step if earlier else 0)  # TRL writes a line per `logging_steps`
        return (self.max_steps - self.step) * sum(s.duration_s for s in recent) / max(1, steps)

    @property
    def recent_tokens_per_s(self) -> float | None:
        return tokens_per_s(self.steps.records[-_RECENT_STEPS:])


def tokens_per_s(steps: Sequence[StepRow]) -> float | None:
    """Return sampled tokens per second of training time. None without steps."""
    duration_s = sum(step.duration_s for step in steps)
    return sum(step.rollout_tokens for step in steps) / duration_s if duration_s else None


def gauge(metrics: str, *names: str) -> int:
    """Return the value of a gauge on a Prometheus page, summed over its labels.

    Uses the first of `names` that is on the page. Returns 0 if none is.
    """
    for name in names:
        if values := re.findall(rf"^{name}(?:{{.*}})? (\S+)", metrics, re.MULTILINE):
            return int(sum(map(float, values)))
    return 0
