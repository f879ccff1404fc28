"""The interface between an algorithm and the loop and learner.

Tensor names end in their shape: B rows (one sequence each), T tokens from the first sampled one of a row to the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

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
    metrics: dict[str, Mean]
    """A metric whose name ends in `/max` is a maximum of non-negative values. Its weight is ignored."""


class LossFunction(Protocol):
    """Computes a micro-batch's part of the step's loss."""

    def __call__(
        self,
        logprobs_BT: Tensor,
        batch: Batch,
        totals: StepTotals,
        *,
        entropy_BT: Tensor,
        old_logprobs_BT: Tensor,
        ref_logprobs_BT: Tensor | None,
    ) -> MicroBatchLoss: ...


class Algorithm(Protocol):
    """One way to learn from groups of trajectories."""

    needs_reference: bool
    """True if `loss` needs logprobs of the policy that training started from."""
    num_iterations: int
    """Optimizer steps per batch. `old_logprobs_BT` comes from the policy before the first of them."""
    entropy_quantile: float | None
    """The quantile of the step's entropies that `loss` needs; None if it needs none."""

    @property
    def loss(self) -> LossFunction: ...

    def make_batch(self, groups: Sequence[Group], gather: Gather) -> Batch:
        """Return this rank's rows to train on, at least one. If `has_signal` is False, the step is skipped."""
        ...
