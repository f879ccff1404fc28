"""From rewards to advantages.

Tensor names end in their shape: P prompts, G samples a prompt, K reward functions. NaN stands for no reward.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

STD_EPSILON = 1e-4
"""Added to the standard deviation that rewards are scaled by (TRL's value)."""


def advantages(rewards_PG: Tensor, scale: Literal["group", "batch", "none"]) -> Tensor:
    """[P, G]. Reward minus its group's mean, scaled; 0 without a reward.

    Source: arXiv:2402.03300 §4.1.2 with Bessel's correction and STD_EPSILON as in TRL; `none` is arXiv:2503.20783,
        `batch` arXiv:2508.08221.
    """
    centred_PG = _centred(rewards_PG)
    if scale == "group":
        centred_PG = centred_PG / (_nanstd(rewards_PG, dim=1) + STD_EPSILON)
    elif scale == "batch":
        centred_PG = centred_PG / (_nanstd(rewards_PG.flatten(), dim=0) + STD_EPSILON)
    return centred_PG.nan_to_num(0.0)


def decoupled_advantages(rewards_PGK: Tensor, weights_K: Tensor) -> Tensor:
    """[P, G]. Each function's rewards scaled within their group, then summed by weight and scaled over the batch.

    Source: GDPO, arXiv:2601.05242 §3.1.
    """
    by_function_KPG = rewards_PGK.movedim(2, 0)
    scaled_PGK = torch.stack([advantages(rewards_PG, "group") for rewards_PG in by_function_KPG], dim=2)
    totals_PG = (scaled_PGK * weights_K).sum(2).masked_fill(rewards_PGK.isnan().all(2), float("nan"))
    return advantages(totals_PG.flatten()[None], "group").view_as(totals_PG)


def _centred(rewards_PG: Tensor) -> Tensor:
    """Minus the group's mean, which rounding must not turn into a learning signal where all rewards are equal."""
    low_P1 = rewards_PG.nan_to_num(float("inf")).amin(1, keepdim=True)
    high_P1 = rewards_PG.nan_to_num(float("-inf")).amax(1, keepdim=True)
    return torch.where(high_P1 > low_P1, rewards_PG - rewards_PG.nanmean(1, keepdim=True), 0.0)


def _nanstd(values: Tensor, *, dim: int) -> Tensor:
    deviations = values - values.nanmean(dim, keepdim=True)
    count = values.isnan().logical_not().sum(dim, keepdim=True)
    return (deviations.square().nansum(dim, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
