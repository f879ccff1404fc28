"""Online Direct Preference Optimization (DPO): learn from pairs of completions of which one is preferred.

Tensor names end in their shape: B rows (one completion each), T completion tokens, P pairs. Rows 2p and 2p + 1 are pair
p, the preferred one first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tandem_protocol.config.learning import OnlineDpoConfig
from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.scored_group import ScoredGroup

from ..batch import Batch, Row, pad
from .base import Gather, Mean, MicroBatchLoss, StepTotals
from .corrections import k3

PAIR = 2


class OnlineDpo:
    """DPO over scored groups of two. The completion with the higher reward is preferred.

    A judge gives the completion that it prefers a higher reward. Pairs sampled by an older policy need no correction
    for lag. A pair with equal rewards is left out, while TRL prefers its first completion.
    """

    needs_reference = True
    num_iterations = 1
    entropy_quantile: float | None = None

    def __init__(self, config: TrainerConfig) -> None:
        self._options = config.online_dpo

    def make_batch(self, groups: Sequence[ScoredGroup], gather: Gather = list) -> Batch:  # noqa: ARG002 - of the Algorithm protocol
        """Return all pairs, with advantage 1 for the preferred completion and -1 for the other."""
        pairs = [pair for group in groups for pair in self._pairs(group)]
        without_loss = [
            Row(groups[0].prompt_ids, completion, advantage=0.0, in_loss=False)
            for completion in groups[0].group.completions
        ]
        rows = [row for pair in pairs for row in pair]
        return pad(
            rows or without_loss,
            row_total=len(pairs),
            token_total=sum(len(row.completion.token_ids) for row in rows),
            rows_together=PAIR,
        )

    def _pairs(self, group: ScoredGroup) -> Iterator[tuple[Row, Row]]:
        """The pair of this group, preferred completion first; none if no completion is preferred."""
        assert len(group.rewards) == PAIR, "the configuration requires num_generations 2"
        penalty = self._options.missing_eos_penalty or 0.0
        completions = group.group.completions
        scores = [
            None if reward is None else reward - penalty * (completion.finish_reason != "stop")
            for reward, completion in zip(group.rewards, completions, strict=True)
        ]
        if scores[0] is None or scores[1] is None or scores[0] == scores[1]:
            return
        chosen, rejected = completions if scores[0] > scores[1] else completions[::-1]
        yield Row(group.prompt_ids, chosen, 1.0, in_loss=True), Row(group.prompt_ids, rejected, -1.0, in_loss=True)

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
        losses_P, metrics_P = pair_losses(logprobs_BT, ref_logprobs_BT, batch.mask_BT, options=self._options)
        pairs_P = batch.advantages_B[::PAIR]  # 1 for a pair; 0 if nothing is preferred
        by_token_BT = {
            "kl_sampler": k3(logprobs_BT, batch.sampler_logprobs_BT),
            "kl_reference": k3(ref_logprobs_BT, logprobs_BT),
            "entropy": entropy_BT,
        }
        metrics = {name: Mean.over(value_P, pairs_P) for name, value_P in metrics_P.items()}
        metrics |= {name: Mean.over(value_BT, batch.mask_BT) for name, value_BT in by_token_BT.items()}
        return MicroBatchLoss((losses_P * pairs_P).sum() / max(1, totals.rows), metrics)


def pair_losses(
    logps: Tensor, ref_logps: Tensor, mask: Tensor, *, options: OnlineDpoConfig | Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each pair [P], and its metrics under DPO's usual names.

    Args:
        logps: [B, T], from the policy in training. `ref_logps` and `mask` have the same shape.

    Source: `sigmoid`: DPO, arXiv:2305.18290 eq. 7; `ipo`: arXiv:2310.12036 eq. 17; online: arXiv:2402.04792. Values
        equal those of TRL 1.16's OnlineDPOTrainer.
    """
    if isinstance(options, Mapping):
        options = OnlineDpoConfig.model_validate(options)
    chosen_P, rejected_P = (logps * mask).sum(1).view(-1, PAIR).unbind(1)
    ref_chosen_P, ref_rejected_P = (ref_logps * mask).sum(1).view(-1, PAIR).unbind(1)
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
