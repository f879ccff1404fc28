"""The metrics that the services export, and the metrics that a PromQL expression uses."""

from __future__ import annotations

import re

import prometheus_client

import tandem_generator.metrics  # noqa: F401 - registers the metrics
from tandem_trainer.run.exporter import PREFIX

OTHERS = {
    "up",
    "kubelet_volume_stats_used_bytes",
    "kubelet_volume_stats_capacity_bytes",
    "kube_job_failed",
    "kube_job_status_active",
    "kube_node_status_condition",
    "kube_pod_info",
}
"""Metrics of Prometheus itself, of the kubelet and of kube-state-metrics."""
STEP = {"reward_mean", "rewards", "loss", "grad_norm", "kl_sampler", "lag_max", "max_lag", "completion_tokens_mean",
        "truncated_fraction", "groups_skipped", "step", "timings",
        "staleness", "checkpoint_failures"}  # fmt: skip
"""Keys of metrics.jsonl that are watched, and the bound `max_lag`. tests/integration/test_trainer_scraped.py finds each
one in a real run."""
SOMETIMES = {"alerts", "replica_tokens"}
"""Keys of metrics.jsonl that are watched too, but have no series in some steps."""


def generator_series() -> set[str]:
    """Return the names of all metrics that the generator itself exports."""
    families = [f for f in prometheus_client.REGISTRY.collect() if f.name.startswith("tandem_")]
    counters = {f"{family.name}_total" for family in families if family.type == "counter"}
    return counters | {sample.name for family in families for sample in family.samples}


def known(series: str) -> bool:
    return series in OTHERS | generator_series() | {PREFIX + key for key in STEP | SOMETIMES}


def used(expression: str) -> set[str]:
    """Return the names of the metrics in a PromQL expression: words that are not followed by a parenthesis."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|on) \([^)]*\)", "", expression)
    return {
        word
        for word in re.findall(r"[a-z_]{2,}\b(?!\s*\()", bare)
        if word not in ("or", "and", "unless", "on", "offset")
    }
