"""What the loop and the learner need of an algorithm.

Tensor names end in their shape: B rows (one completion each), T completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from ..batch import Batch, ScoredGroup


class Totals(NamedTuple):
    """What a loss takes from the whole step, over all micro-batches and ranks."""

    rows: int
    tokens: int
    entropy_threshold: Tensor | None = None
    """The `entropy_quantile` of the entropies of all tokens in the loss; a scalar."""


Gather = Callable[[list[float]], list[float]]
"""From values to those of all ranks; every rank calls it at the same time."""


class Mean(NamedTuple):
    """A mean and what it is over, so that means of parts make the mean of the whole."""

    value: Tensor
    weight: Tensor

    @classmethod
    def over(cls, values: Tensor, weights: Tensor) -> Mean:
        return cls((values.detach() * weights).sum() / weights.sum().clamp(min=1), weights.sum())


class MicroBatchLoss(NamedTuple):
    """What a micro-batch adds to the step."""

    loss: Tensor
    metrics: dict[str, Mean]
    """One whose name ends in `/max` is a maximum, whatever its weight; of values that are not negative."""


class LossFunction(Protocol):
    """From a micro-batch to its share of the step's loss."""

    def __call__(
        self,
        logprobs_BT: Tensor,
        batch: Batch,
        totals: Totals,
        *,
        entropy_BT: Tensor,
        old_logprobs_BT: Tensor,
        ref_logprobs_BT: Tensor | None,
    ) -> MicroBatchLoss: ...


class Algorithm(Protocol):
    """One way to learn from scored groups."""

    needs_reference: bool
    """Whether `loss` wants logprobs of the policy that training started from."""
    num_iterations: int
    """Optimizer steps for one batch; `old_logprobs_BT` is of the policy before the first of them."""
    entropy_quantile: float | None
    """Which quantile of the step's entropies `loss` wants to know, if any."""

    @property
    def loss(self) -> LossFunction: ...

    def make_batch(self, groups: Sequence[ScoredGroup], gather: Gather) -> Batch:
        """This rank's rows to train on, at least one; without `has_signal` there is nothing to learn from them."""
        ...
