"""Group Relative Policy Optimization and the losses that came of it.

Tensor names end in their shape: P prompts, G samples a prompt, B rows (one completion each), T completion tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch, Row, ScoredGroup, pad
from ..config import GrpoConfig, TrainerConfig
from .advantages import advantages, decoupled_totals, standardized
from .base import Gather, Mean, MicroBatchLoss, Totals
from .corrections import k3, off_policy_mask, reference_kl, sampler_correction, top_entropy_mask
from .objectives import LOSS_TYPES, Counts, LossType
from .tokens import Tokens

NAN = float("nan")


class Grpo:
    """GRPO over scored groups.

    The old policy of the ratio is the one before the batch's first optimizer step, so in that step the ratio is 1 and
    clipping never binds; rollouts of older policies are corrected by `importance_sampling` alone.
    """

    def __init__(self, config: TrainerConfig) -> None:
        self._options = options = config.grpo
        self._weights_K = torch.tensor([reward.weight for reward in config.rewards], dtype=torch.float64)
        self._max_completion_length = config.rollout.max_completion_length
        self.needs_reference = options.beta > 0
        self.num_iterations = options.num_iterations
        self.entropy_quantile = 1 - options.top_entropy_quantile if options.top_entropy_quantile < 1 else None

    def make_batch(self, groups: Sequence[ScoredGroup], gather: Gather = list) -> Batch:
        """Rows with a gradient; those without one still count in the totals, so leaving them out changes no value."""
        rows = [
            Row(group.prompt_ids, completion, advantage, in_loss=reward is not None and self._counts(completion))
            for group, row in zip(groups, self._advantages(groups, gather), strict=True)
            for completion, reward, advantage in zip(group.group.completions, group.rewards, row, strict=True)
        ]
        all_matter = self.needs_reference or self.entropy_quantile is not None
        trained = [row for row in rows if row.in_loss and (row.advantage or all_matter)]
        return pad(
            trained or rows[:1],
            row_total=sum(reward is not None for group in groups for reward in group.rewards),
            token_total=sum(len(row.completion.token_ids) for row in rows if row.in_loss),
        )

    def _advantages(self, groups: Sequence[ScoredGroup], gather: Gather) -> list[list[float]]:
        """One list a group."""

        def everyones(values_PG: Tensor) -> Tensor:
            return torch.tensor(gather(values_PG.flatten().tolist()), dtype=torch.float64)

        scale, totals_PG = self._options.scale_rewards, _tensor([group.rewards for group in groups])
        if self._options.multi_objective_aggregation == "sum_then_normalize":
            batch_N = everyones(totals_PG) if scale == "batch" else None
            return advantages(totals_PG, scale, batch_N).tolist()
        by_function_PGK = torch.stack([_tensor(group.rewards_by_function.values()).T for group in groups])
        # A function that failed leaves its whole group without a reward, whatever the others said.
        by_function_PGK = by_function_PGK.masked_fill(totals_PG.isnan()[..., None], NAN)
        decoupled_PG = decoupled_totals(by_function_PGK, self._weights_K)
        return standardized(decoupled_PG, everyones(decoupled_PG)).tolist()

    def _counts(self, completion: Any) -> bool:
        return not (self._options.mask_truncated_completions and completion.finish_reason == "length")

    def loss(
        self,
        logprobs_BT: Tensor,
        batch: Batch,
        totals: Totals,
        *,
        entropy_BT: Tensor,
        old_logprobs_BT: Tensor,
        ref_logprobs_BT: Tensor | None,
    ) -> MicroBatchLoss:
        loss, metrics = policy_loss(
            logprobs_BT,
            old_logprobs_BT,
            batch.advantages_B,
            batch.mask_BT,
            options=self._options,
            ref_logps=ref_logprobs_BT,
            sampler_logps=batch.sampler_logprobs_BT,
            entropy=entropy_BT,
            max_completion_length=self._max_completion_length,
            token_total=totals.tokens,
            row_total=totals.rows,
            entropy_threshold=totals.entropy_threshold,
        )
        tokens = batch.mask_BT.sum()
        return MicroBatchLoss(loss, {name: Mean(value, tokens) for name, value in metrics.items()})


def _tensor(rewards: Any) -> Tensor:
    return torch.tensor([[NAN if reward is None else reward for reward in row] for row in rewards], dtype=torch.float64)


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
    max_completion_length: int | None = None,
    token_total: int | None = None,
    row_total: int | None = None,
    entropy_threshold: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss that `options.loss_type` names, and metrics as means over the tokens in `mask`; `/max` is a maximum.

    Args:
        logps: [B, T], of the policy in training; so are `old_logps`, `mask`, `ref_logps`, `sampler_logps`, `entropy`.
        advantages: [B, T], [B, 1] or [B].
        options: a mapping that names no `importance_sampling` means none.
        max_completion_length: wanted by `dr_grpo`.
        token_total: tokens of the whole step when these rows are only a part of it; `row_total`, and
            `entropy_threshold` for `top_entropy_quantile`, likewise.

    Raises:
        ValueError: an option wants an argument that is not given.

    Source: `objectives.py` and `corrections.py` have the papers. KL: k3, times the ratio so that its gradient is
        unbiased off-policy (DeepSeek-V3.2, arXiv:2512.02556 eq. 7). Values equal those of TRL 1.16's GRPOTrainer,
        whose `bnpo` differs from `dapo` only by the micro-batch it is computed in, which changes nothing here.
    """
    if isinstance(options, Mapping):
        options = GrpoConfig.model_validate({"importance_sampling": "none", **options})
    tokens = Tokens(
        logprobs_BT=logps,
        old_logprobs_BT=old_logps,
        advantages_BT=advantages if advantages.dim() == 2 else advantages[:, None],
        mask_BT=mask.to(logps.dtype),
        ref_logprobs_BT=ref_logps,
        sampler_logprobs_BT=sampler_logps,
        entropy_BT=entropy,
        entropy_threshold=entropy_threshold,
    )
    loss_type, counts = (
        LOSS_TYPES[options.loss_type],
        Counts(
            rows=len(mask) if row_total is None else row_total,
            tokens=int(mask.sum()) if token_total is None else token_total,
            max_completion_length=max_completion_length,
        ),
    )
    loss_BT, metrics_BT = _token_losses(tokens, loss_type, options)
    return loss_type.reduce(loss_BT, tokens.mask_BT, counts), _means(metrics_BT, tokens.mask_BT)


def _token_losses(tokens: Tokens, loss_type: LossType, options: GrpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Objective, times masks and correction, plus KL; and metrics of each token."""
    loss_BT, metrics_BT = loss_type.objective(tokens, options)
    correction_BT, kl_BT = sampler_correction(tokens, options), reference_kl(tokens, options)
    outer_BT = correction_BT if loss_type.multiplies_correction else None
    for factor_BT in (off_policy_mask(tokens, options), top_entropy_mask(tokens, options), outer_BT):
        loss_BT = loss_BT if factor_BT is None else loss_BT * factor_BT
    if kl_BT is not None:
        loss_BT = loss_BT + options.beta * kl_BT
    if tokens.sampler_logprobs_BT is not None:
        metrics_BT |= {"kl_sampler": k3(tokens.logprobs_BT, tokens.sampler_logprobs_BT)}
    optional_BT = {
        "kl_reference": kl_BT,
        "entropy": tokens.entropy_BT,
        "sampling/importance_sampling_ratio/mean": correction_BT,
        "sampling/importance_sampling_ratio/max": correction_BT,
    }
    return loss_BT, metrics_BT | {name: value for name, value in optional_BT.items() if value is not None}


def _means(metrics_BT: Mapping[str, Tensor], mask_BT: Tensor) -> dict[str, Tensor]:
    """Over the tokens in the mask; of a name that ends in `/max` their maximum, of values that are not negative."""
    nothing = mask_BT.new_zeros(1)
    return {
        name: torch.cat([(value_BT.detach() * mask_BT).flatten(), nothing]).max()
        if name.endswith("/max")
        else Mean.over(value_BT, mask_BT).value
        for name, value_BT in metrics_BT.items()
    }
