"""The interface between an algorithm and the loop and learner.

Tensor names end in their shape: B rows (one sequence each), T tokens from the first sampled one of a row to the last.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from tandem_protocol.config.trainer import TrainerConfig
from tandem_rollout.trajectory import Group

from ..batch import Batch


class StepTotals(NamedTuple):
    """What a loss needs to know of the complete step, over all micro-batches and ranks."""

    trajectories: int
    """Number of trajectories."""
    tokens: int
    """Number of sampled tokens in the loss."""
    entropy_threshold: Tensor | None = None
    """The `entropy_quantile` of the entropies of all tokens in the loss. A scalar tensor."""
    max_completion_length: int | None = None
    """Largest possible number of sampled tokens of a trajectory."""


Gather = Callable[[list[float]], list[float]]
"""Takes this rank's values and returns those of all ranks. Every rank calls it at the same time."""


class Mean(NamedTuple):
    """A mean with its total weight, so that the means of micro-batches can be merged."""

    value: Tensor
    weight: Tensor

    @classmethod
    def over(cls, values: Tensor, weights: Tensor) -> Mean:
        return cls((values.detach() * weights).sum() / weights.sum().clamp(min=1), weights.sum())


class MicroBatchLoss(NamedTuple):
    """A micro-batch's part of the step's loss, and its metrics."""

    loss: Tensor
    """A scalar. The parts of all micro-batches and ranks are added up."""
    metrics: Mapping[str, Mean] = {}
    """A metric whose name ends in `/max` is a maximum of non-negative values. Its weight is ignored."""


class Algorithm(Protocol):
    """One way to learn from groups of trajectories. An algorithm of the project derives from this class."""

    needs_reference: bool = False
    """True if `loss` needs logprobs of the policy that training started from."""
    num_iterations: int = 1
    """Optimizer steps per batch. `old_logprobs_BT` comes from the policy before the first of them."""
    entropy_quantile: float | None = None
    """The quantile of the step's entropies that `loss` needs; None if it needs none."""

    def __init__(self, config: TrainerConfig) -> None:
        """Take what the algorithm needs from the settings. An algorithm of the project also gets its arguments."""

    @abstractmethod
    def make_batch(self, groups: Sequence[Group], gather: Gather) -> Batch:
        """Return this rank's rows to train on, at least one. If `has_signal` is False, the step is skipped."""
        ...

    @abstractmethod
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
        """Compute a micro-batch's part of the step's loss, divided by one of the `totals`.

        The parts must add up to the same loss, however the batch is split. `batch.mask_BT` is 0 where a token does not
        count, and everywhere in a batch that a rank computes only to keep the others company.

        Args:
            entropy_BT: of the policy, without a gradient.
            old_logprobs_BT: from the policy before the batch's first optimizer step.
            ref_logprobs_BT: from the policy that training started from. None unless `needs_reference`.
        """
        ...


RECORD_FIELDS = frozenset({
    "step", "version", "reward_mean", "reward_std", "rewards", "rewards_std", "mismatch", "loss", "grad_norm",
    "learning_rate", "lag_max", "completion_tokens_mean", "truncated_fraction", "rollout_tokens", "groups_skipped",
    "checkpoint_failures", "timings", "tokens_per_s", "eval", "staleness", "turns_mean", "tool_calls", "tool_errors",
    "environment_s_mean", "episodes_failed", "refilled", "reasked", "replica_tokens",
    "replica_outstanding", "reward_none_fraction", "rewards_none_fraction", "repetitive_fraction", "alerts",
})  # fmt: skip
"""Fields of `metrics.jsonl` that do not come from an algorithm. Its metrics have other names."""
