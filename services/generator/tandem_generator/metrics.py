"""Metrics of the generator. With vLLM, `/metrics` contains them next to vLLM's own."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

REQUESTS_RUNNING = Gauge("tandem_requests_running", "Rollout requests that are running.")
ROLLOUT_TOKENS = Counter("tandem_rollout_tokens", "Tokens sampled for rollouts.")
ROLLOUT_COMPLETIONS = Counter("tandem_rollout_completions", "Completions sampled for rollouts.")
WEIGHT_STEP = Gauge("tandem_weight_step", "Optimizer step of the served version.")
WEIGHT_ATTEMPT = Gauge("tandem_weight_attempt", "Trainer attempt of the served version. 0 for base weights.")
SWITCH_SECONDS = Histogram(
    "tandem_switch_seconds",
    "Duration of weight switches.",
    buckets=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
)
SWITCH_FAILURES = Counter("tandem_switch_failures", "Weight switches that were refused or failed.", ["code"])
READY = Gauge("tandem_ready", "1 while the generator answers rollout requests.")
