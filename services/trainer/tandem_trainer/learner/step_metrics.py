"""Metrics of one optimizer step, and functions that merge them over micro-batches, ranks and steps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..algorithms.base import Mean

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


def to_host(loss: Tensor, metrics: Mapping[str, Mean]) -> tuple[float, dict[str, WeightedMean]]:
    """Copy a micro-batch's loss and metrics from the device, in one transfer."""
    scalars = [loss.detach(), *(scalar for mean in metrics.values() for scalar in mean)]
    value, *rest = torch.stack(scalars).tolist()
    means = zip(rest[::2], rest[1::2], strict=True)
    return value, dict(zip(metrics, means, strict=True))


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
    names = dict.fromkeys(name for part in parts for name in part)  # a loss of the project may leave some out
    return metrics | {name: _mean_or_max(name, [part[name] for part in parts if name in part]) for name in names}


def _mean_or_max(name: str, means: list[WeightedMean]) -> float:
    """Return the largest value if `name` ends in `/max`, else the weighted mean of the means."""
    if name.endswith("/max"):
        return max(value for value, _ in means)
    return sum(value * weight for value, weight in means) / max(sum(weight for _, weight in means), 1)
