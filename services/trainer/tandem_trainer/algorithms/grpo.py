"""Group Relative Policy Optimization.

Tensor names end in their shape: P prompts, G samples a prompt, B rows (one completion each), T completion tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..batch import Batch, Row, ScoredGroup, pad
from ..config import GrpoConfig
from .base import Totals

STD_EPSILON = 1e-4
"""Added to the standard deviation that rewards are scaled by (TRL's value)."""


class Grpo:
    """GRPO over scored groups, one optimizer step a batch.

    The old policy of the ratio is the policy before that step, so the ratio is 1 and clipping never binds; rollouts of
    older policies are corrected by `importance_sampling` alone.
    """

    def __init__(self, options: GrpoConfig) -> None:
        self._options = options
        self.needs_reference = options.beta > 0

    def make_batch(self, groups: Sequence[ScoredGroup]) -> Batch:
        """Rows with a gradient; those without one still count in the totals, so leaving them out changes no value."""
        rewards_PG = torch.tensor(
            [[float("nan") if r is None else r for r in g.rewards] for g in groups], dtype=torch.float64
        )
        advantages_PG = advantages(rewards_PG, self._options.scale_rewards).tolist()
        rows = [
            Row(group.prompt_ids, completion, advantage, in_loss=reward is not None and self._counts(completion))
            for group, row in zip(groups, advantages_PG, strict=True)
            for completion, reward, advantage in zip(group.group.completions, group.rewards, row, strict=True)
        ]
        trained = [row for row in rows if row.in_loss and (row.advantage or self.needs_reference)]
        return pad(
            trained or rows[:1],
            row_total=sum(reward is not None for group in groups for reward in group.rewards),
            token_total=sum(len(row.completion.token_ids) for row in rows if row.in_loss),
        )

    def _counts(self, completion: Any) -> bool:
        return not (self._options.mask_truncated_completions and completion.finish_reason == "length")

    def loss(
        self,
        logprobs_BT: Tensor,
        batch: Batch,
        totals: Totals,
        *,
        entropy_BT: Tensor,
        ref_logprobs_BT: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return policy_loss(
            logprobs_BT,
            logprobs_BT.detach(),
            batch.advantages_B[:, None],
            batch.mask_BT,
            options=self._options,
            ref_logps=ref_logprobs_BT,
            sampler_logps=batch.sampler_logprobs_BT,
            entropy=entropy_BT,
            token_total=totals.tokens,
            row_total=totals.rows,
        )


def policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    options: GrpoConfig | Mapping[str, Any],
    ref_logps: Tensor | None = None,
    sampler_logps: Tensor | None = None,
    entropy: Tensor | None = None,
    max_completion_length: int | None = None,  # noqa: ARG001 - part of the losses' common signature
    token_total: int | None = None,
    row_total: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy-gradient loss, and metrics as means over the tokens in `mask`.

    Args:
        logps: [B, T], of the policy in training; so are `old_logps`, `mask`, `ref_logps`, `sampler_logps`, `entropy`.
        advantages: [B, T], [B, 1] or [B].
        options: a mapping that names no `importance_sampling` means none.
        token_total: tokens of the whole step when these rows are only a part of it; `row_total` likewise.

    Source: GRPO, arXiv:2402.03300 eq. 3 (`grpo`: mean over each row, then over rows); DAPO, arXiv:2503.14476 eq. 8
        (`dapo`: mean over all tokens). KL: k3 of http://joschu.net/blog/kl-approx.html, times the ratio so that its
        gradient is unbiased off-policy (arXiv:2512.02556 eq. 7). Values equal TRL 1.16's.
    """
    if isinstance(options, Mapping):
        options = GrpoConfig.model_validate({"importance_sampling": "none", **options})
    advantages_BT = advantages if advantages.dim() == 2 else advantages[:, None]
    high = options.epsilon if options.epsilon_high is None else options.epsilon_high
    ratio_BT = (logps - old_logps).exp()
    clipped_BT = ratio_BT.clamp(1 - options.epsilon, 1 + high)
    loss_BT = -torch.min(ratio_BT * advantages_BT, clipped_BT * advantages_BT)
    metrics_BT: dict[str, Tensor] = {}
    if sampler_logps is not None:
        metrics_BT["kl_sampler"] = _k3(logps.detach(), sampler_logps)
        if options.importance_sampling == "token_truncate":
            loss_BT = loss_BT * (old_logps - sampler_logps).exp().clamp(max=options.clip_max)
    if options.beta > 0:
        assert ref_logps is not None, "beta > 0 needs the reference's logprobs"
        kl_BT = _k3(ref_logps, logps) * ratio_BT
        metrics_BT["kl_reference"] = kl_BT.detach()
        loss_BT = loss_BT + options.beta * kl_BT
    if entropy is not None:
        metrics_BT["entropy"] = entropy
    loss = _reduce(loss_BT, mask, options.loss_type, token_total=token_total, row_total=row_total)
    tokens = mask.sum().clamp(min=1)
    return loss, {name: (value_BT * mask).sum() / tokens for name, value_BT in metrics_BT.items()}


def _k3(numerator_logps: Tensor, denominator_logps: Tensor) -> Tensor:
    """Estimate, token by token, of KL(denominator ‖ numerator) for samples of the denominator; never negative."""
    log_ratio = numerator_logps - denominator_logps
    return log_ratio.exp() - log_ratio - 1


def _reduce(
    loss_BT: Tensor, mask_BT: Tensor, loss_type: str, *, token_total: int | None, row_total: int | None
) -> Tensor:
    masked_BT = loss_BT * mask_BT
    if loss_type == "dapo":
        return masked_BT.sum() / max(1, int(mask_BT.sum()) if token_total is None else token_total)
    per_row_B = masked_BT.sum(1) / mask_BT.sum(1).clamp(min=1)
    return per_row_B.sum() / max(1, len(mask_BT) if row_total is None else row_total)


def advantages(rewards_PG: Tensor, scale: Literal["group", "batch", "none"]) -> Tensor:
    """[P, G]. Reward minus its group's mean, scaled; NaN stands for no reward and gets 0.

    Source: arXiv:2402.03300 §4.1.2 with Bessel's correction and STD_EPSILON as in TRL; `none` is arXiv:2503.20783.
    """
    centred_PG = rewards_PG - rewards_PG.nanmean(1, keepdim=True)
    # Rounding in the mean must not turn equal rewards into a learning signal.
    low_P1 = rewards_PG.nan_to_num(float("inf")).amin(1, keepdim=True)
    high_P1 = rewards_PG.nan_to_num(float("-inf")).amax(1, keepdim=True)
    centred_PG = torch.where(high_P1 > low_P1, centred_PG, 0.0)
    if scale == "group":
        centred_PG = centred_PG / (_nanstd(rewards_PG, dim=1) + STD_EPSILON)
    elif scale == "batch":
        centred_PG = centred_PG / (_nanstd(rewards_PG.flatten(), dim=0) + STD_EPSILON)
    return centred_PG.nan_to_num(0.0)


def _nanstd(values: Tensor, *, dim: int) -> Tensor:
    deviations = values - values.nanmean(dim, keepdim=True)
    count = values.isnan().logical_not().sum(dim, keepdim=True)
    return (deviations.square().nansum(dim, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
