"""Online Direct Preference Optimization (DPO): learn from pairs of trajectories of which one is preferred.

Tensor names end in their shape: B rows (one sequence each), T tokens from the first sampled one of a row to the last, P
pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tandem_protocol.config.learning import OnlineDpoConfig
from tandem_protocol.config.names import is_of_project
from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.trajectory import Group, Trajectory

from ..batch import Batch, pad, rows_of
from .base import Algorithm, Gather, Mean, MicroBatchLoss, StepTotals
from .corrections import k3
from .project import ProjectPairLoss
from .tokens import Pairs


class OnlineDpo(Algorithm):
    """DPO over groups of two. The trajectory with the higher reward is preferred.

    The logprob of a trajectory is the sum over the sampled tokens of all its sequences.

    A judge gives the trajectory that it prefers a higher reward. Pairs sampled by an older policy need no correction
    for lag. A pair with equal rewards is left out, while TRL prefers its first completion.
    """

    needs_reference = True

    def __init__(self, config: TrainerConfig) -> None:
        """
        Raises:
            UserError: the loss is a function of the project that cannot be imported or called.
        """
        self._options = config.online_dpo
        self._pair_loss = pair_loss_of(config.online_dpo)

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
            rows or unpaired,
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
        pairs = Pairs(chosen_P, rejected_P, ref_chosen_P, ref_rejected_P)
        losses_P, metrics_P = self._pair_loss(pairs, self._options)
        metrics_P |= pair_metrics(pairs, self._options)
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


PairLoss = Callable[[Pairs, OnlineDpoConfig], tuple[Tensor, dict[str, Tensor]]]
"""Computes the loss of each pair [P], and more metrics [P] than those of `pair_metrics`."""


def sigmoid(pairs: Pairs, options: OnlineDpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Source: DPO, arXiv:2305.18290 eq. 7; online: arXiv:2402.04792. Values equal TRL 1.16's OnlineDPOTrainer."""
    return -logsigmoid(options.beta * pairs.logits_P), {}


def ipo(pairs: Pairs, options: OnlineDpoConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Source: Identity Preference Optimization, arXiv:2310.12036 eq. 17. Values equal TRL 1.16's OnlineDPOTrainer."""
    return (pairs.logits_P - 1 / (2 * options.beta)).square(), {}


PAIR_LOSSES: dict[str, PairLoss] = {"sigmoid": sigmoid, "ipo": ipo}


def pair_loss_of(options: OnlineDpoConfig) -> PairLoss:
    """Return the loss that `options.loss_type` names.

    Raises:
        UserError: it is a function of the project that cannot be imported or called.
    """
    return ProjectPairLoss(options) if is_of_project(options.loss_type) else PAIR_LOSSES[options.loss_type]


@torch.no_grad()
def pair_metrics(pairs: Pairs, options: OnlineDpoConfig) -> dict[str, Tensor]:
    """Metrics of each pair [P], under DPO's usual names."""
    logits_P = pairs.logits_P
    return {
        "rewards/chosen": options.beta * (pairs.chosen_P - pairs.ref_chosen_P),
        "rewards/rejected": options.beta * (pairs.rejected_P - pairs.ref_rejected_P),
        "rewards/margins": options.beta * logits_P,
        "rewards/accuracies": (logits_P > 0).to(logits_P.dtype),
        "logps/chosen": pairs.chosen_P,
        "logps/rejected": pairs.rejected_P,
    }
