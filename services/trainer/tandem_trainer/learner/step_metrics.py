"""Metrics of one optimizer step, and functions that merge them over micro-batches, ranks and steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..algorithms.base import MicroBatchLoss

MISMATCH = "mismatch"

WeightedMean = tuple[float, float]
"""A mean and its total weight."""


class StepMetrics(NamedTuple):
    """Results of one optimizer step."""

    loss: float
    grad_norm: float
    metrics: list[dict[str, WeightedMean]]
    """One item for every micro-batch on every rank."""
    mismatch: float | None


def to_host(micro_batch_loss: MicroBatchLoss) -> tuple[float, dict[str, WeightedMean]]:
    """Copy a micro-batch's loss and metrics from the device, in one transfer."""
    scalars = [
        micro_batch_loss.loss.detach(),
        *(scalar for mean in micro_batch_loss.metrics.values() for scalar in mean),
    ]
    loss, *rest = torch.stack(scalars).tolist()
    means = zip(rest[::2], rest[1::2], strict=True)
    return loss, dict(zip(micro_batch_loss.metrics, means, strict=True))


def update_metrics(steps: Sequence[StepMetrics], learning_rate: float) -> dict[str, float]:
    """Merge the optimizer steps of one update.

    `mismatch` comes from the first step. It is left out if the first step has none.
    """
    metrics = {
        "loss": statistics.fmean(step.loss for step in steps),
        "grad_norm": statistics.fmean(step.grad_norm for step in steps),
        "learning_rate": learning_rate,
    }
    if steps[0].mismatch is not None:
        metrics[MISMATCH] = steps[0].mismatch
    parts = [part for step in steps for part in step.metrics]
    return metrics | {name: _mean_or_max(name, [part[name] for part in parts]) for name in parts[0]}


def _mean_or_max(name: str, means: list[WeightedMean]) -> float:
    """Return the largest value if `name` ends in `/max`, else the weighted mean of the means."""
    if name.endswith("/max"):
        return max(value for value, _ in means)
    return sum(value * weight for value, weight in means) / max(sum(weight for _, weight in means), 1)
