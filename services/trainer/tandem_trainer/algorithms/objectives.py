"""GRPO's family of losses: for each `loss_type`, the objective of a token and how tokens are reduced to a loss.

Tensor names end in their shape: B rows (one sequence each), T tokens from the first sampled one of a row to the last. A
tensor whose name ends in BT is [B, 1] if it has one value per row, such as the ratio at sequence level.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tandem_protocol.config.learning import GrpoConfig

from .base import StepTotals
from .corrections import policy_ratio, sampler_correction
from .tokens import Tokens

MAX_LOG_RATIO = 20.0
MIN_LOG_WEIGHT = math.log(1e-8)


class Objective(NamedTuple):
    """Loss and metrics per token, before the correction for the sampler."""

    loss_BT: Tensor
    metrics_BT: dict[str, Tensor]


def clipped(tokens: Tokens, _: StepTotals, options: GrpoConfig) -> Objective:
    """Ratio times advantage, where the ratio is clipped in the advantage's direction.

    `delta` also bounds the ratio for negative advantages, which clipping leaves unbounded.

    Source: GRPO, arXiv:2402.03300 eq. 3; `epsilon_high`: DAPO, arXiv:2503.14476 eq. 8; `delta`: INTELLECT-2,
        arXiv:2505.07291 (two-sided clipping).
    """
    low = 1 - options.epsilon
    high = 1 + options.upper_epsilon
    ratio_BT = policy_ratio(tokens, options)
    advantages_BT = tokens.advantages_BT
    clipped_BT = ratio_BT.clamp(low, high)
    if options.delta is not None:
        ratio_BT = ratio_BT.clamp(max=options.delta)
    loss_BT = -torch.min(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
    too_low_BT = (ratio_BT < low) & (advantages_BT < 0)
    too_high_BT = (ratio_BT > high) & (advantages_BT > 0)
    metrics_BT = {"low_mean": too_low_BT, "high_mean": too_high_BT, "region_mean": too_low_BT | too_high_BT}
    return Objective(loss_BT, {f"clip_ratio/{name}": value for name, value in metrics_BT.items()})


def cispo(tokens: Tokens, _: StepTotals, options: GrpoConfig) -> Objective:
    """REINFORCE weighted by the ratio, which is capped at `epsilon_high` itself (not at 1 + epsilon_high).

    Source: MiniMax-M1, arXiv:2506.13585 eq. 4–5; the cap as in ScaleRL, arXiv:2510.13786.
    """
    ratio_BT = policy_ratio(tokens, options).detach()
    weight_BT = ratio_BT.clamp(max=options.upper_epsilon)
    capped_BT = (ratio_BT > options.upper_epsilon) & (tokens.advantages_BT > 0)
    return Objective(-weight_BT * tokens.advantages_BT * tokens.logprobs_BT, {"cispo_clip_ratio": capped_BT})


def sapo(tokens: Tokens, _: StepTotals, options: GrpoConfig) -> Objective:
    """Advantage weighted by a sigmoid of the ratio, which replaces the clip by a smooth gate around ratio 1.

    Source: Soft Adaptive Policy Optimization, arXiv:2511.20347 eq. 6.
    """
    temperature_BT = _by_sign(tokens.advantages_BT > 0, options.sapo_temperature_pos, options.sapo_temperature_neg)
    gate_BT = torch.sigmoid(temperature_BT * (policy_ratio(tokens, options) - 1)) * 4 / temperature_BT
    return Objective(-gate_BT * tokens.advantages_BT, {})


def vespo(tokens: Tokens, _: StepTotals, options: GrpoConfig) -> Objective:
    """REINFORCE weighted by a gamma density of the row's ratio to its sampler. At ratio 1 the weight is 1.

    Source: Variational Sequence-Level Soft Policy Optimization, arXiv:2602.10693; the clamps are the authors'.
    """
    log_weight_B1 = (tokens.log_ratio_BT.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO) * tokens.mask_BT).sum(1, True)
    correction_BT = sampler_correction(tokens, options)
    if correction_BT is not None:
        log_weight_B1 = log_weight_B1 + correction_BT.log().clamp(MIN_LOG_WEIGHT, MAX_LOG_RATIO).sum(1, True)
    log_weight_B1 = log_weight_B1.clamp(MIN_LOG_WEIGHT, MAX_LOG_RATIO)
    better_BT = tokens.advantages_BT >= 0
    k_BT = _by_sign(better_BT, options.vespo_k_pos, options.vespo_k_neg)
    lambda_BT = _by_sign(better_BT, options.vespo_lambda_pos, options.vespo_lambda_neg).clamp(min=1e-4)
    phi_BT = (lambda_BT + k_BT * log_weight_B1 - lambda_BT * log_weight_B1.exp()).exp()
    phi_BT = phi_BT.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return Objective(-phi_BT * tokens.advantages_BT * tokens.logprobs_BT, {"vespo/phi_seq_mean": phi_BT})


def _by_sign(condition_BT: Tensor, positive: float, negative: float) -> Tensor:
    """Choose `positive` where the condition holds, else `negative`.

    The values are always float32, as in TRL: 1.05 is a different number in float64.
    """
    values = torch.tensor([negative, positive], dtype=torch.float32, device=condition_BT.device)
    return values[condition_BT.long()]


def trajectory_mean(loss_BT: Tensor, tokens: Tokens, totals: StepTotals) -> Tensor:
    """Mean over the tokens of each trajectory, then over trajectories. Source: GRPO, arXiv:2402.03300 eq. 3.

    The rows of a trajectory may be in different micro-batches. So each row adds its sum over the trajectory's tokens.
    """
    return ((loss_BT * tokens.mask_BT).sum(1) / tokens.counts_B).sum() / max(1, totals.trajectories)


def trajectory_sum(loss_BT: Tensor, tokens: Tokens, totals: StepTotals) -> Tensor:
    """Sum over each trajectory, then mean over trajectories. Source: LUSPO, arXiv:2602.05261."""
    return (loss_BT * tokens.mask_BT).sum() / max(1, totals.trajectories)


def token_mean(loss_BT: Tensor, tokens: Tokens, totals: StepTotals) -> Tensor:
    """Mean over all tokens. Source: DAPO, arXiv:2503.14476 eq. 8."""
    return (loss_BT * tokens.mask_BT).sum() / max(1, totals.tokens)


def constant_mean(loss_BT: Tensor, tokens: Tokens, totals: StepTotals) -> Tensor:
    """Sum over all tokens, divided by the largest possible number of tokens. Source: Dr. GRPO, arXiv:2503.20783.

    Raises:
        ValueError: max_completion_length is missing.
    """
    if totals.max_completion_length is None:
        raise ValueError("loss_type dr_grpo got no max_completion_length, expected the largest number of tokens")
    return (loss_BT * tokens.mask_BT).sum() / (max(1, totals.trajectories) * totals.max_completion_length)


class LossType(NamedTuple):
    """The parts of a loss."""

    objective: Callable[[Tokens, StepTotals, GrpoConfig], Objective]
    reduce: Callable[[Tensor, Tokens, StepTotals], Tensor]
    multiplies_correction: bool = True
    """True if the sampler's correction multiplies the objective. Otherwise the objective contains it already."""
    needs_reference: bool = False
    """True if the objective needs logprobs of the policy that training started from."""


LOSS_TYPES = {
    "grpo": LossType(clipped, trajectory_mean),
    "bnpo": LossType(clipped, token_mean),
    "dr_grpo": LossType(clipped, constant_mean),
    "dapo": LossType(clipped, token_mean),
    "cispo": LossType(cispo, token_mean),
    "sapo": LossType(sapo, trajectory_mean),
    "vespo": LossType(vespo, token_mean, multiplies_correction=False),
    "luspo": LossType(clipped, trajectory_sum),
}

REDUCTIONS = {reduce.__name__: reduce for reduce in (trajectory_mean, trajectory_sum, token_mean, constant_mean)}
