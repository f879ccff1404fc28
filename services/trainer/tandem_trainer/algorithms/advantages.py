"""Compute advantages from rewards.

Tensor names end in their shape: P prompts, G samples per prompt, K reward functions, N values. NaN means no reward.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

STD_EPSILON = 1e-4
"""Added to the standard deviation that rewards are divided by (TRL's value)."""


def advantages(rewards_PG: Tensor, scale: Literal["group", "batch", "none"], batch_N: Tensor | None = None) -> Tensor:
    """Subtract the group's mean from each reward, and scale. Returns [P, G], with 0 for completions without a reward.

    Args:
        scale: divide by the standard deviation of the group or of the batch, or do not divide.
        batch_N: rewards of the complete batch, for `scale` "batch" when `rewards_PG` is only one rank's part of it.

    Source: arXiv:2402.03300 §4.1.2 with Bessel's correction and STD_EPSILON as in TRL; `none` is arXiv:2503.20783,
        `batch` arXiv:2508.08221.
    """
    centred_PG = _centred(rewards_PG, rewards_PG)
    if scale == "group":
        centred_PG = centred_PG / (_nanstd(rewards_PG) + STD_EPSILON)
    elif scale == "batch":
        batch_N = rewards_PG.flatten() if batch_N is None else batch_N
        centred_PG = centred_PG / (_nanstd(batch_N) + STD_EPSILON)
    return centred_PG.nan_to_num(0.0)


def decoupled_totals(rewards_PGK: Tensor, weights_K: Tensor) -> Tensor:
    """Scale each function's rewards within their group, then add them up by weight.

    Returns [P, G], with NaN where no function gave a reward.

    Source: GDPO, arXiv:2601.05242 §3.1; `standardized` is its second part.
    """
    scaled_PGK = torch.stack([advantages(rewards_PG, "group") for rewards_PG in rewards_PGK.unbind(2)], dim=2)
    return (scaled_PGK * weights_K).sum(2).masked_fill(rewards_PGK.isnan().all(2), float("nan"))


def standardized(values_PG: Tensor, batch_N: Tensor) -> Tensor:
    """Standardize by the mean and standard deviation of the batch. Returns [P, G], with 0 for NaN."""
    return (_centred(values_PG, batch_N) / (_nanstd(batch_N) + STD_EPSILON)).nan_to_num(0.0)


def _centred(values: Tensor, among: Tensor) -> Tensor:
    """Subtract the mean of `among` over its last dimension. Equal values give exactly 0, in spite of rounding."""
    low = among.nan_to_num(float("inf")).amin(-1, keepdim=True)
    high = among.nan_to_num(float("-inf")).amax(-1, keepdim=True)
    return torch.where(high > low, values - among.nanmean(-1, keepdim=True), 0.0)


def _nanstd(values: Tensor) -> Tensor:
    """Standard deviation over the last dimension, ignoring NaN. Bessel's factor is always in float32, as in TRL."""
    variance = (values - values.nanmean(-1, keepdim=True)).square().nanmean(-1, keepdim=True)
    count = values.isnan().logical_not().sum(-1, keepdim=True).float()
    return (variance * (count / (count - 1).clamp(min=1))).sqrt()
