"""From rewards to advantages.

Tensor names end in their shape: P prompts, G samples a prompt, K reward functions. NaN stands for no reward.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

STD_EPSILON = 1e-4
"""Added to the standard deviation that rewards are scaled by (TRL's value)."""


def advantages(rewards_PG: Tensor, scale: Literal["group", "batch", "none"], batch_N: Tensor | None = None) -> Tensor:
    """[P, G]. Reward minus its group's mean, scaled; 0 without a reward.

    Args:
        batch_N: rewards of the whole batch for `scale` "batch", when `rewards_PG` is one rank's part of it.

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
    """[P, G]. Each function's rewards scaled within their group, then summed by weight; NaN without any reward.

    Source: GDPO, arXiv:2601.05242 §3.1; `standardized` is the rest of it.
    """
    scaled_PGK = torch.stack([advantages(rewards_PG, "group") for rewards_PG in rewards_PGK.unbind(2)], dim=2)
    return (scaled_PGK * weights_K).sum(2).masked_fill(rewards_PGK.isnan().all(2), float("nan"))


def standardized(values_PG: Tensor, batch_N: Tensor) -> Tensor:
    """[P, G]. By mean and deviation of the whole batch; 0 for NaN."""
    return (_centred(values_PG, batch_N) / (_nanstd(batch_N) + STD_EPSILON)).nan_to_num(0.0)


def _centred(values: Tensor, among: Tensor) -> Tensor:
    """Minus the last dimension's mean, which rounding must not turn into a signal where all values are equal."""
    low = among.nan_to_num(float("inf")).amin(-1, keepdim=True)
    high = among.nan_to_num(float("-inf")).amax(-1, keepdim=True)
    return torch.where(high > low, values - among.nanmean(-1, keepdim=True), 0.0)


def _nanstd(values: Tensor) -> Tensor:
    """Over the last dimension. Bessel's factor is in float32, as it is in TRL, whatever the values are."""
    variance = (values - values.nanmean(-1, keepdim=True)).square().nanmean(-1, keepdim=True)
    count = values.isnan().logical_not().sum(-1, keepdim=True).float()
    return (variance * (count / (count - 1).clamp(min=1))).sqrt()
