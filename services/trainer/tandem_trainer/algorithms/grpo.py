"""Group Relative Policy Optimization (GRPO) and the losses derived from it.

Tensor names end in their shape: P groups, G trajectories per group, K rewards, N values of the complete batch, B rows
(one sequence each), T tokens from the first sampled one of a row to the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tandem_protocol.config.learning import GrpoConfig
from tandem_protocol.config.names import is_of_project
from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.trajectory import Group, Trajectory

from ..batch import Batch, pad, rows_of
from .advantages import advantages, decoupled_totals, standardized
from .base import Algorithm, Gather, Mean, MicroBatchLoss, StepTotals
from .corrections import k3, off_policy_mask, reference_kl, sampler_correction, top_entropy_mask
from .objectives import LOSS_TYPES, REDUCTIONS, LossType, token_mean
from .project import ProjectAdvantage, ProjectLoss, check_metric_name
from .tokens import Tokens

NAN = float("nan")


class Grpo(Algorithm):
    """GRPO over groups of trajectories. All sequences of a trajectory are trained with its advantage.

    The ratio compares the policy with the one before the batch's first optimizer step. In that step the ratio is 1 and
    clipping has no effect. Only `importance_sampling` corrects for rollouts of older policies.
    """

    def __init__(self, config: TrainerConfig) -> None:
        """
        Raises:
            UserError: a function of the project cannot be imported or called.
        """
        options = config.grpo
        self._options = options
        self._weights = {reward.function: reward.weight for reward in config.rewards}
        self._loss_type = loss_type_of(options)
        self._advantage = (
            ProjectAdvantage(options.advantage, options.advantage_arguments) if options.advantage else None
        )
        self.needs_reference = options.beta > 0 or self._loss_type.needs_reference
        self.num_iterations = options.num_iterations
        self.entropy_quantile = 1 - options.top_entropy_quantile if options.top_entropy_quantile < 1 else None

    def make_batch(self, groups: Sequence[Group], gather: Gather = list) -> Batch:
        """Return the rows that have a gradient. The totals count the other rows too, so the loss is unchanged."""
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        advantages_N = [advantage for values in self._advantages(groups, gather) for advantage in values]
        pairs = zip(trajectories, advantages_N, strict=True)
        rows = [row for one, advantage in pairs for row in rows_of(one, advantage, in_loss=self._counts(one))]
        # With a KL term, an entropy quantile or a loss of the project, rows without an advantage count too.
        needs_all = self.needs_reference or self.entropy_quantile is not None or is_of_project(self._options.loss_type)
        trained = [row for row in rows if row.in_loss and (row.advantage or needs_all)]
        return pad(
            trained or rows[:1],
            trajectory_total=sum(trajectory.in_loss for trajectory in trajectories),
            token_total=sum(trajectory.num_sampled for trajectory in trajectories if self._counts(trajectory)),
        )

    def _advantages(self, groups: Sequence[Group], gather: Gather) -> list[list[float]]:
        """Compute the advantages: one list per group."""
        if self._advantage:
            return self._project_advantages(self._advantage, groups, gather)

        def of_all_ranks(values_PG: Tensor) -> Tensor:
            return torch.tensor(gather(values_PG.flatten().tolist()), dtype=torch.float64)

        scale = self._options.scale_rewards
        totals_PG = _tensor([group.rewards for group in groups])
        if self._options.multi_objective_aggregation == "sum_then_normalize":
            batch_N = of_all_ranks(totals_PG) if scale == "batch" else None
            return advantages(totals_PG, scale, batch_N).tolist()
        weights = self._weights | {name: 1.0 for name in _reward_names(groups) if name not in self._weights}
        by_reward_PGK = torch.stack(
            [_tensor([[one.rewards.get(name) for one in group.trajectories] for group in groups]) for name in weights],
            dim=2,
        )
        # If one function failed, the group has no total reward, so the rewards of the other functions do not count.
        by_reward_PGK = by_reward_PGK.masked_fill(totals_PG.isnan()[..., None], NAN)
        decoupled_PG = decoupled_totals(by_reward_PGK, torch.tensor([*weights.values()], dtype=torch.float64))
        return standardized(decoupled_PG, of_all_ranks(decoupled_PG)).tolist()

    def _project_advantages(
        self, advantage: ProjectAdvantage, groups: Sequence[Group], gather: Gather
    ) -> list[list[float]]:
        """Call the project's function once per group, with the trajectories that have a reward. The others get 0."""
        scored = [[one for one in group.trajectories if one.in_loss] for group in groups]
        rewards = [[one.reward or 0.0 for one in trajectories] for trajectories in scored]
        batch_N = torch.tensor(gather([reward for of_group in rewards for reward in of_group]), dtype=torch.float64)
        advantages_PG = []
        for group, trajectories, of_group in zip(groups, scored, rewards, strict=True):
            rewards_G = torch.tensor(of_group, dtype=torch.float64)
            given = iter(advantage(rewards_G, batch_N, trajectories, self._options) if trajectories else ())
            advantages_PG.append([next(given) if one.in_loss else 0.0 for one in group.trajectories])
        return advantages_PG

    def _counts(self, trajectory: Trajectory) -> bool:
        return trajectory.in_loss and not (self._options.mask_truncated_completions and trajectory.truncated)

    def loss(
        self,
        logprobs_BT: Tensor,
        batch: Batch,
        totals: StepTotals,
        *,
        entropy_BT: Tensor,
        old_logprobs_BT: Tensor,
        ref_logprobs_BT: Tensor | None,
    ) -> MicroBatchLoss:
        tokens = Tokens(
            logprobs_BT=logprobs_BT,
            old_logprobs_BT=old_logprobs_BT,
            advantages_BT=batch.advantages_B[:, None],
            mask_BT=batch.mask_BT.to(logprobs_BT.dtype),
            trajectory_tokens_B=batch.trajectory_tokens_B.to(logprobs_BT.dtype),
            ref_logprobs_BT=ref_logprobs_BT,
            sampler_logprobs_BT=batch.sampler_logprobs_BT,
            entropy_BT=entropy_BT,
        )
        loss, metrics = policy_loss(tokens, totals, self._options, self._loss_type)
        count = batch.mask_BT.sum()
        return MicroBatchLoss(loss, {name: Mean(value, count) for name, value in metrics.items()})


def _reward_names(groups: Sequence[Group]) -> list[str]:
    """Names of all rewards, those of environments included."""
    return list(dict.fromkeys(name for group in groups for one in group.trajectories for name in one.rewards))


def _tensor(rewards: Any) -> Tensor:
    return torch.tensor([[NAN if reward is None else reward for reward in row] for row in rewards], dtype=torch.float64)


def loss_type_of(options: GrpoConfig) -> LossType:
    """Return the loss that `options.loss_type` names, with the reduction that `options.reduction` names.

    Raises:
        UserError: it is a function of the project that cannot be imported or called.
    """
    if is_of_project(options.loss_type):
        loss = ProjectLoss(options)
        loss_type = LossType(loss, token_mean, needs_reference=loss.needs_reference)
    else:
        loss_type = LOSS_TYPES[options.loss_type]
    return loss_type._replace(reduce=REDUCTIONS[options.reduction]) if options.reduction else loss_type


def policy_loss(
    tokens: Tokens, totals: StepTotals, options: GrpoConfig, loss_type: LossType | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss that `options.loss_type` names, and its metrics.

    Metrics are means over the tokens in the mask. Those whose names end in `/max` are maxima.

    Args:
        totals: of the complete step, of which `tokens` may be a part.
        loss_type: what `loss_type_of(options)` returned, so that it need not be found again.

    Raises:
        ValueError: an option needs a tensor or a total that is None.

    Source: `objectives.py` and `corrections.py` name the papers. KL: k3, times the ratio if `bias_correction_kl`
        (DeepSeek-V3.2, arXiv:2512.02556 eq. 7). Values equal those of TRL 1.16's GRPOTrainer. There, `bnpo` differs
        from `dapo` by averaging per micro-batch. Here both average over the complete step, so they are equal.
    """
    loss_type = loss_type or loss_type_of(options)
    loss_BT, metrics_BT = _token_losses(tokens, totals, options, loss_type)
    return loss_type.reduce(loss_BT, tokens, totals), _means(metrics_BT, tokens.mask_BT)


def _token_losses(
    tokens: Tokens, totals: StepTotals, options: GrpoConfig, loss_type: LossType
) -> tuple[Tensor, dict[str, Tensor]]:
    """Multiply the objective by masks and correction, and add the KL term. Returns loss and metrics per token."""
    loss_BT, metrics_BT = loss_type.objective(tokens, totals, options)
    correction_BT = sampler_correction(tokens, options)
    kl_BT = reference_kl(tokens, options)
    factors_BT = [off_policy_mask(tokens, options), top_entropy_mask(tokens, totals, options)]
    if loss_type.multiplies_correction:
        factors_BT.append(correction_BT)
    for factor_BT in factors_BT:
        if factor_BT is not None:
            loss_BT = loss_BT * factor_BT
    if kl_BT is not None:
        loss_BT = loss_BT + options.beta * kl_BT
    sampled_BT = tokens.sampler_logprobs_BT
    optional_BT = {
        "kl_sampler": None if sampled_BT is None else k3(tokens.logprobs_BT, sampled_BT),
        "kl_reference": kl_BT,
        "entropy": tokens.entropy_BT,
        "sampling/importance_sampling_ratio/mean": correction_BT,
        "sampling/importance_sampling_ratio/max": correction_BT,
    }
    for name in metrics_BT:
        check_metric_name(f"loss {options.loss_type}", name, optional_BT.keys())
    return loss_BT, metrics_BT | {name: value for name, value in optional_BT.items() if value is not None}


def _means(metrics_BT: Mapping[str, Tensor], mask_BT: Tensor) -> dict[str, Tensor]:
    """Average each metric over the tokens in the mask, or take the maximum if its name ends in `/max`."""
    means = {}
    for name, value_BT in metrics_BT.items():
        if name.endswith("/max"):
            # Values are not negative, so the extra 0 changes no maximum. It is the result of an empty mask.
            means[name] = torch.cat([(value_BT.detach() * mask_BT).flatten(), mask_BT.new_zeros(1)]).max()
        else:
            means[name] = Mean.over(value_BT, mask_BT).value
    return means
