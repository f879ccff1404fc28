"""Online Direct Preference Optimization (DPO): learn from pairs of trajectories of which one is preferred.

Tensor names end in their shape: B rows (one sequence each), T tokens from the first sampled one of a row to the last, P
pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tandem_protocol.config.learning import OnlineDpoConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.trajectory import Group, Trajectory

from ..batch import NOTHING, Batch, pad, rows_of
from .base import Gather, Mean, MicroBatchLoss, StepTotals
from .corrections import k3


class OnlineDpo:
    """DPO over groups of two. The trajectory with the higher reward is preferred.

    The logprob of a trajectory is the sum over the sampled tokens of all its sequences.

    A judge gives the trajectory that it prefers a higher reward. Pairs sampled by an older policy need no correction
    for lag. A pair with equal rewards is left out, while TRL prefers its first completion.
    """

    needs_reference = True
    num_iterations = 1
    entropy_quantile: float | None = None

    def __init__(self, config: TrainerConfig) -> None:
        self._options = config.online_dpo

    def make_batch(self, groups: Sequence[Group], gather: Gather = list) -> Batch:  # noqa: ARG002 - of the Algorithm protocol
        """Return all pairs, with advantage 1 for the rows of the preferred trajectory and -1 for those of the other."""
        pairs = [pair for group in groups for pair in self._pairs(group)]
        rows = [
            row
            for number, pair in enumerate(pairs)
            for trajectory, advantage in zip(pair, (1.0, -1.0), strict=True)
            for row in rows_of(trajectory, advantage, in_loss=True, unit=number)
        ]
        unpaired = [row for one in groups[0].trajectories for row in rows_of(one, 0.0, in_loss=False, unit=0)]
        return pad(
            rows or unpaired or [NOTHING],
            trajectory_total=len(pairs),
            token_total=sum(trajectory.num_sampled for pair in pairs for trajectory in pair),
        )

    def _pairs(self, group: Group) -> Iterator[tuple[Trajectory, Trajectory]]:
        """The pair of this group, preferred trajectory first; none if neither is preferred."""
        one, other = group.trajectories  # the configuration requires num_generations 2
        scores = [self._score(one), self._score(other)]
        if scores[0] is None or scores[1] is None or scores[0] == scores[1]:
            return
        yield (one, other) if scores[0] > scores[1] else (other, one)

    def _score(self, trajectory: Trajectory) -> float | None:
        if trajectory.reward is None or not trajectory.in_loss:
            return None
        return trajectory.reward - (self._options.missing_eos_penalty or 0.0) * trajectory.truncated

    def loss(
        self,
        logprobs_BT: Tensor,
        batch: Batch,
        totals: StepTotals,
        *,
        entropy_BT: Tensor,
        old_logprobs_BT: Tensor,  # noqa: ARG002 - of the LossFunction protocol
        ref_logprobs_BT: Tensor | None,
    ) -> MicroBatchLoss:
        assert ref_logprobs_BT is not None, "needs_reference"
        chosen_P, rejected_P = _pair_sums(logprobs_BT, batch)
        ref_chosen_P, ref_rejected_P = _pair_sums(ref_logprobs_BT, batch)
        losses_P, metrics_P = pair_losses(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P, self._options)
        pairs_P = _sums(batch.advantages_B > 0, batch).clamp(max=1)  # 1 for a pair; 0 if nothing is preferred
        by_token_BT = {
            "kl_sampler": k3(logprobs_BT, batch.sampler_logprobs_BT),
            "kl_reference": k3(ref_logprobs_BT, logprobs_BT),
            "entropy": entropy_BT,
        }
        metrics = {name: Mean.over(value_P, pairs_P) for name, value_P in metrics_P.items()}
        metrics |= {name: Mean.over(value_BT, batch.mask_BT) for name, value_BT in by_token_BT.items()}
        return MicroBatchLoss((losses_P * pairs_P).sum() / max(1, totals.trajectories), metrics)


def _pair_sums(logprobs_BT: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logprobs of the preferred and of the other trajectory of each pair: [P] each."""
    row_sums_B = (logprobs_BT * batch.mask_BT).sum(1)
    preferred_B = batch.advantages_B > 0
    return _sums(row_sums_B * preferred_B, batch), _sums(row_sums_B * ~preferred_B, batch)


def _sums(values_B: Tensor, batch: Batch) -> Tensor:
    """Add up the values of each pair's rows: [P]. Micro-batches contain complete pairs."""
    values_B = values_B.to(torch.promote_types(values_B.dtype, batch.mask_BT.dtype))
    return values_B.new_zeros(batch.num_units).index_add(0, batch.unit_B, values_B)


def pair_losses(
    chosen_P: Tensor, rejected_P: Tensor, ref_chosen_P: Tensor, ref_rejected_P: Tensor, options: OnlineDpoConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each pair [P], and its metrics under DPO's usual names.

    Args:
        chosen_P: logprobs of the preferred trajectories, from the policy in training.
        rejected_P: logprobs of the others.
        ref_chosen_P: like `chosen_P`, from the reference. `ref_rejected_P` likewise.

    Source: `sigmoid`: DPO, arXiv:2305.18290 eq. 7; `ipo`: arXiv:2310.12036 eq. 17; online: arXiv:2402.04792. Values
        equal those of TRL 1.16's OnlineDPOTrainer.
    """
    logits_P = (chosen_P - rejected_P) - (ref_chosen_P - ref_rejected_P)
    if options.loss_type == "sigmoid":
        losses_P = -logsigmoid(options.beta * logits_P)
    else:
        losses_P = (logits_P - 1 / (2 * options.beta)).square()
    with torch.no_grad():
        metrics_P = {
            "rewards/chosen": options.beta * (chosen_P - ref_chosen_P),
            "rewards/rejected": options.beta * (rejected_P - ref_rejected_P),
            "rewards/margins": options.beta * logits_P,
            "rewards/accuracies": (logits_P > 0).to(logits_P.dtype),
            "logps/chosen": chosen_P,
            "logps/rejected": rejected_P,
        }
    return losses_P, metrics_P
